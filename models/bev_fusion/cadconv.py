"""Content-aware dilated convolution: kernels and dilations chosen per cell.

The paper's abstract says that such a convolution on the ultrasonic features absorbs the misalignment of the sensors. The
equations are ours and stand at :class:`CaDConv`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from models.errors import UserError
from models.sizes import CPU_VALUES, fits

TAPS = tuple((q // 3 - 1, q % 3 - 1) for q in range(9))


class CaDConv(nn.Module):
    """Each cell p chooses its receptive field, and in ``dynamic`` mode its 3x3 kernels too.

    With the content ``z = ReLU(BN(compress x))``, dilations ``d_r`` and offsets ``o_q`` of the 9 taps::

        alpha(p) = softmax_r(dilation z)            taps_{r, g}(p) = softmax_q(kernel z)
        y_c(p) = sum_r alpha_r(p) sum_q taps_{r, g(c), q}(p) (value x)_c(p + d_r o_q)
        out = ReLU(x + BN(W_out y))

    Args:
        channels: C, in and out.
        dilations: the R fields to choose from.
        groups: G sets of kernels over the channels.
        mid: channels in which the content is judged; null is C / 4.
        mode: 'dynamic' predicts a kernel per cell, group and dilation; 'select' shares one kernel and predicts which
            dilation it is used with.
    """

    def __init__(
        self,
        channels: int,
        dilations: Sequence[int] = (1, 2, 3),
        groups: int = 8,
        mid: int | None = None,
        mode: str = "dynamic",
    ):
        super().__init__()
        if mode == "dynamic" and channels % groups:
            raise UserError(f"CaDConv: {channels} channels do not divide into {groups} groups.")
        if mode not in ("dynamic", "select"):
            raise UserError(f"CaDConv: unknown mode '{mode}'; there are dynamic and select.")
        mid, fields = mid or max(channels // 4, 1), len(dilations)
        self.dilations, self.groups, self.mode = tuple(dilations), groups, mode
        self.compress = nn.Sequential(nn.Conv2d(channels, mid, 1, bias=False), nn.BatchNorm2d(mid))
        self.dilation = nn.Conv2d(mid, fields, 3, padding=1)
        nn.init.zeros_(self.dilation.weight)
        nn.init.zeros_(self.dilation.bias)
        if mode == "dynamic":
            self.kernel = nn.Conv2d(mid, fields * groups * 9, 3, padding=1)
            nn.init.zeros_(self.kernel.weight)
            nn.init.zeros_(self.kernel.bias)
            self.value = nn.Conv2d(channels, channels, 1, bias=False)
            self.out = nn.Conv2d(channels, channels, 1, bias=False)
            nn.init.kaiming_normal_(self.out.weight)
        else:
            self.static = nn.Conv2d(channels, channels, 3, bias=False)
            nn.init.kaiming_normal_(self.static.weight)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn.weight)  # starts as the identity

    def choices(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weights of the dilations (B, R, H, W) and, in dynamic mode, of the taps (B, R, G, 9, H, W); both sum to 1."""
        content = F.relu(self.compress(x))
        alpha = self.dilation(content).float().softmax(1)
        if self.mode == "select":
            return alpha, None
        taps = self.kernel(content).float()
        taps = taps.view(len(x), len(self.dilations), self.groups, 9, *x.shape[2:])
        return alpha, taps.softmax(3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        alpha, taps = self.choices(x)
        if taps is None:
            y = sum(
                alpha[:, r, None].to(x) * F.conv2d(x, self.static.weight, padding=d, dilation=d)
                for r, d in enumerate(self.dilations)
            )
        else:
            y = self.out(gather_taps(self.value(x), alpha, taps, self.dilations))
        return F.relu(x + self.bn(y))


def gather_taps(value: Tensor, alpha: Tensor, taps: Tensor, dilations: Sequence[int]) -> Tensor:
    """``y_c(p) = sum_r alpha_r(p) sum_q taps_{r, g(c), q}(p) value_c(p + d_r o_q)``, zeros outside.

    Args:
        value: (B, C, H, W).
        alpha: (B, R, H, W).
        taps: (B, R, G, 9, H, W), one set for each of G groups of channels.

    Half precision is summed in float32: 9 R terms, one after the other, would lose what bf16 keeps.
    """
    dtype = torch.promote_types(value.dtype, torch.float32)
    if fits(value.device, 3 * 9 * len(dilations) * value.numel() * dtype.itemsize):
        return stacked_taps(value.to(dtype), alpha.to(dtype), taps.to(dtype), dilations).to(value.dtype)
    parts = (tensor.to(dtype).contiguous() for tensor in (value, alpha, taps))
    return _GatherTaps.apply(*parts, tuple(dilations)).to(value.dtype)


def stacked_taps(value: Tensor, alpha: Tensor, taps: Tensor, dilations: Sequence[int]) -> Tensor:
    """:func:`gather_taps` by unfolding ``value`` once for each dilation.

    On a GPU it takes half the time of the loop over the taps, whose launches cost more than its work (H200: forward 0.66 ms
    against 1.28 ms, training 2.4 ms against 5.2 ms), and ten times its memory.
    """
    batch, channels, height, width = value.shape
    groups = taps.shape[2]
    copies = torch.stack([F.unfold(value, 3, dilation=d, padding=d) for d in dilations], dim=1)
    copies = copies.view(batch, len(dilations), groups, channels // groups, 9, height, width)
    fields = (taps[:, :, :, None] * copies).sum(4)
    return (alpha[:, :, None, None] * fields).sum(1).reshape(value.shape)


class _GatherTaps(torch.autograd.Function):
    """Loops over the taps with shifted views instead of unfolding R * 9 copies of the value.

    Rows are padded and laid end to end, so that every shift is a shift along one contiguous axis. The dilation's and the tap's
    weight are multiplied first, and the middle taps, the same cell for every dilation, are added into one: 8 R + 1 are left.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, alpha: Tensor, taps: Tensor, dilations: tuple[int, ...]) -> Tensor:
        work = _Workspace(value, taps, dilations)
        out, result = torch.empty_like(value), torch.empty_like(work.middle)
        by_group, inner = work.by_group(out), work.crop(result)
        for chunk in work.chunks():
            work.load(value, alpha, taps, chunk)
            torch.mul(work.weights[0], work.values[0], out=result)
            for weight, shifted in zip(work.weights[1:], work.values[1:], strict=True):
                result.addcmul_(weight, shifted)
            by_group[chunk] = inner
        ctx.save_for_backward(value, alpha, taps)
        ctx.dilations = dilations
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, alpha, taps = ctx.saved_tensors
        work = _Workspace(value, taps, ctx.dilations)
        grad_value, grad_alpha, grad_taps = torch.empty_like(value), torch.zeros_like(alpha), torch.empty_like(taps)
        grads, by_group = work.by_group(grad), work.by_group(grad_value)
        g, product = torch.zeros_like(work.middle), torch.empty_like(work.middle)
        into = torch.empty_like(work.padded)
        into_middle, into_values = work.shifts(into)
        by_tap = torch.empty_like(work.by_tap)
        into_weights, by_tap_inner = work.weights_of_taps(by_tap), work.crop(by_tap)
        g_inner, into_inner, weights_inner = work.crop(g), work.crop(into_middle), work.crop(work.by_tap)
        for chunk in work.chunks():
            samples, groups = chunk
            work.load(value, alpha, taps, chunk)
            g_inner.copy_(grads[chunk])
            into.zero_()
            for k, weight in enumerate(work.weights):
                into_values[k].addcmul_(weight, g)
                torch.sum(torch.mul(g, work.values[k], out=product), dim=2, out=into_weights[k][:, :, 0])
            by_group[chunk] = into_inner
            by_tap[:, 1:, :, 4] = by_tap[:, :1, :, 4]  # one weight stood for the middle taps of all dilations
            torch.mul(alpha[samples, :, None, None], by_tap_inner, out=grad_taps[samples, :, groups])
            torch.mul(taps[samples, :, groups], by_tap_inner, out=weights_inner)
            grad_alpha[samples] += weights_inner.sum((2, 3))
        return grad_value, grad_alpha, grad_taps, None


class _Workspace:
    """Buffers for one chunk of s samples and t groups, and views of them, made once: making them takes as long as using them.

    Rows are of width W + 2 m laid end to end, m being the largest dilation, with m empty rows before and after. The margins are
    written once and stay empty.

    Attributes:
        padded: the values (s, t, C / G, lead + length + lead), and ``middle`` their part without the leads.
        by_tap: the weights (s, R, t, 9, length); those of the middle taps are added into the first dilation's.
        values, weights: of each tap that is left, views (s, t, C / G, length) of the shifted values and (s, t, 1, length).
    """

    def __init__(self, value: Tensor, taps: Tensor, dilations: tuple[int, ...]):
        self.batch, channels, self.height, self.columns = value.shape
        self.groups = taps.shape[2]
        self.width, margin = channels // self.groups, max(dilations)
        self.stride = self.columns + 2 * margin
        self.length = self.height * self.stride
        # One more margin at either end: a diagonal shift of the first or last cells runs past the padded rows.
        self.lead = margin * self.stride + margin
        fields = len(dilations)
        self._taps = [(0, 4)] + [(r, q) for r in range(fields) for q in range(9) if q != 4]
        self._starts = [self.lead + dilations[r] * (TAPS[q][0] * self.stride + TAPS[q][1]) for r, q in self._taps]
        self.samples, self.together = self.batch, self.groups
        if value.device.type == "cpu":
            most = CPU_VALUES * torch.get_num_threads() // (self.width * self.length)
            self.together = _divisor(self.groups, most)
            self.samples = _divisor(self.batch, most // self.groups)
        self.padded = value.new_zeros(self.samples, self.together, self.width, self.length + 2 * self.lead)
        self.by_tap = value.new_zeros(self.samples, fields, self.together, 9, self.length)
        self.middle, self.values = self.shifts(self.padded)
        self.weights = self.weights_of_taps(self.by_tap)
        self._values_inner, self._weights_inner = self.crop(self.middle), self.crop(self.by_tap)

    def shifts(self, padded: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What lies between the leads, and the same shifted to each tap that is left."""
        shifted = [padded[..., start : start + self.length] for start in self._starts]
        return shifted[0], shifted

    def weights_of_taps(self, by_tap: Tensor) -> list[Tensor]:
        """Of (s, R, t, 9, length) each tap that is left, (s, t, 1, length)."""
        return [by_tap[:, r, :, q, None] for r, q in self._taps]

    def chunks(self) -> list[tuple[slice, slice]]:
        return [
            (slice(b, b + self.samples), slice(g, g + self.together))
            for b in range(0, self.batch, self.samples)
            for g in range(0, self.groups, self.together)
        ]

    def load(self, value: Tensor, alpha: Tensor, taps: Tensor, chunk: tuple[slice, slice]) -> None:
        """Fill ``padded`` and ``by_tap`` with the chunk's values and weights."""
        samples, groups = chunk
        self._values_inner.copy_(self.by_group(value)[chunk])
        torch.mul(alpha[samples, :, None, None], taps[samples, :, groups], out=self._weights_inner)
        middle = self.by_tap[:, :, :, 4]
        for r in range(1, middle.shape[1]):
            middle[:, 0] += middle[:, r]

    def by_group(self, x: Tensor) -> Tensor:
        """(B, C, H, W) as (B, G, C / G, H, W)."""
        return x.reshape(self.batch, self.groups, self.width, self.height, self.columns)

    def crop(self, flat: Tensor) -> Tensor:
        """(..., length) as (..., H, W), without the margins."""
        return flat.unflatten(-1, (self.height, self.stride))[..., : self.columns]


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is not above ``most``; at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and (d <= most or d == 1))
