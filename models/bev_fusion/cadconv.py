"""Content-aware dilated convolution (specification: BEV fusion, 2.5).

That the paper places such a convolution on the ultrasonic features, to absorb the misalignment of the sensors, is from its
abstract; these equations are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.errors import UserError

TAPS = tuple((q // 3 - 1, q % 3 - 1) for q in range(9))


class CaDConv(nn.Module):
    """Each cell chooses its receptive field, and in ``dynamic`` mode its 3x3 kernels too; residual.

    Args:
        channels: C, in and out. dilations: the R fields to choose from. groups: G sets of kernels over the channels.
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
        value: (B, C, H, W). alpha: (B, R, H, W). taps: (B, R, G, 9, H, W), one set for each of G groups of channels.
    """
    parts = (tensor.contiguous() for tensor in (value, alpha.to(value.dtype), taps.to(value.dtype)))
    return _GatherTaps.apply(*parts, tuple(dilations))


# So many numbers of the value are treated at once on each core: what its second-level cache keeps beside weights and result.
CHUNK = 2**17


class _GatherTaps(torch.autograd.Function):
    """Loops over the taps with shifted views instead of unfolding R * 9 copies of the value.

    Rows are padded and laid end to end, so that every shift is a shift along one contiguous axis. The dilation's and the tap's
    weight are multiplied first, and the middle taps, the same cell for every dilation, are added into one: 8 R + 1 are left.
    """

    @staticmethod
    def forward(ctx, value: Tensor, alpha: Tensor, taps: Tensor, dilations: tuple[int, ...]) -> Tensor:
        work = _Workspace(value, taps, dilations)
        out = torch.empty_like(value)
        by_group = work.by_group(out)
        for chunk in work.chunks():
            v, w = work.values(value, chunk), work.weights(alpha, taps, chunk)
            o = torch.mul(w[:, :, -1, None], v[..., work.lead : work.lead + work.length])
            for k, start in enumerate(work.starts[:-1]):
                o.addcmul_(w[:, :, k, None], v[..., start : start + work.length])
            by_group[chunk] = work.crop(o)
        ctx.save_for_backward(value, alpha, taps)
        ctx.dilations = dilations
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        value, alpha, taps = ctx.saved_tensors
        work = _Workspace(value, taps, ctx.dilations)
        grad_value, grad_alpha, grad_taps = torch.empty_like(value), torch.zeros_like(alpha), torch.empty_like(taps)
        by_group = work.by_group(grad_value)
        for chunk in work.chunks():
            v, w = work.values(value, chunk), work.weights(alpha, taps, chunk)
            g = F.pad(work.by_group(grad)[chunk], (0, 2 * work.margin)).flatten(-2)
            gv, gw, product = torch.zeros_like(v), torch.empty_like(w), torch.empty_like(g)
            for k, start in enumerate(work.starts):
                span = slice(start, start + work.length)
                gv[..., span].addcmul_(w[:, :, k, None], g)
                torch.mul(g, v[..., span], out=product)
                torch.sum(product, dim=2, out=gw[:, :, k])
            by_group[chunk] = work.crop(gv[..., work.lead : work.lead + work.length])
            work.split(work.crop(gw), alpha, taps, grad_alpha, grad_taps, chunk)
        return grad_value, grad_alpha, grad_taps, None


class _Workspace:
    """Rows of width W + 2 m laid end to end, m being the largest dilation, with m empty rows before and after; buffers for one
    chunk of samples and groups, whose empty margins are written once."""

    def __init__(self, value: Tensor, taps: Tensor, dilations: tuple[int, ...]):
        self.batch, channels, self.height, self.columns = value.shape
        self.groups, self.dilations = taps.shape[2], dilations
        self.width, self.margin = channels // self.groups, max(dilations)
        stride = self.columns + 2 * self.margin
        self.length = self.height * stride
        # One more margin at either end: a diagonal shift of the first or last cells runs past the padded rows.
        self.lead = self.margin * stride + self.margin
        around = [offset for offset in TAPS if offset != (0, 0)]
        self.starts = [self.lead + d * (dy * stride + dx) for d in dilations for dy, dx in around] + [self.lead]
        group = self.width * self.length
        if value.device.type != "cpu":
            self.samples, self.together = self.batch, self.groups
        else:
            most = CHUNK * torch.get_num_threads()
            self.together = min(self.groups, max(1, most // group))
            self.samples = max(1, most // (group * self.groups)) if self.together == self.groups else 1
        shape = (min(self.samples, self.batch), self.together)
        self._values = value.new_zeros(*shape, self.width, self.length + 2 * self.lead)
        self._weights = value.new_zeros(*shape, len(self.starts), self.height, stride)

    def chunks(self) -> list[tuple[slice, slice]]:
        return [
            (slice(b, min(b + self.samples, self.batch)), slice(g, min(g + self.together, self.groups)))
            for b in range(0, self.batch, self.samples)
            for g in range(0, self.groups, self.together)
        ]

    def by_group(self, x: Tensor) -> Tensor:
        """(B, C, H, W) as (B, G, C / G, H, W)."""
        return x.reshape(self.batch, self.groups, self.width, self.height, self.columns)

    def values(self, value: Tensor, chunk: tuple[slice, slice]) -> Tensor:
        """The chunk's values, padded: (b, g, C / G, lead + length + lead)."""
        mine = self.by_group(value)[chunk]
        out = self._values[: mine.shape[0], : mine.shape[1]]
        self.crop(out[..., self.lead : self.lead + self.length]).copy_(mine)
        return out

    def weights(self, alpha: Tensor, taps: Tensor, chunk: tuple[slice, slice]) -> Tensor:
        """The chunk's weights (b, g, 8 R + 1, length), zero in the margins."""
        samples, groups = chunk
        mine = taps[samples, :, groups]
        out = self._weights[: mine.shape[0], : mine.shape[2]]
        inner = out[..., : self.columns]
        for r in range(len(self.dilations)):
            share, field = alpha[samples, r, None, None], mine[:, r]
            torch.mul(share, field[:, :, :4], out=inner[:, :, 8 * r : 8 * r + 4])
            torch.mul(share, field[:, :, 5:], out=inner[:, :, 8 * r + 4 : 8 * r + 8])
        inner[:, :, -1] = (alpha[samples, :, None] * mine[:, :, :, 4]).sum(1)
        return out.flatten(-2)

    def split(
        self, grad: Tensor, alpha: Tensor, taps: Tensor, grad_alpha: Tensor, grad_taps: Tensor, chunk: tuple[slice, slice]
    ) -> None:
        """Pass gradients (b, g, 8 R + 1, H, W) of :meth:`weights` on to the dilations' and the taps' weights."""
        samples, groups = chunk
        for r in range(len(self.dilations)):
            share, field, into = alpha[samples, r, None, None], taps[samples, r, groups], grad_taps[samples, r, groups]
            ends = grad[:, :, 8 * r : 8 * r + 4], grad[:, :, -1:], grad[:, :, 8 * r + 4 : 8 * r + 8]
            for part, first, last in zip(ends, (0, 4, 5), (4, 5, 9), strict=True):
                torch.mul(share, part, out=into[:, :, first:last])
                grad_alpha[samples, r] += (field[:, :, first:last] * part).sum((1, 2))

    def crop(self, flat: Tensor) -> Tensor:
        """(..., length) as (..., H, W), without the margins."""
        return flat.unflatten(-1, (self.height, self.columns + 2 * self.margin))[..., : self.columns]
