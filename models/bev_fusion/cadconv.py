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
            weights = (alpha[:, :, None, None] * taps).transpose(1, 2)  # (B, G, R, 9, H, W)
            y = self.out(gather_taps(self.value(x), *join_centres(weights, self.dilations)))
        return F.relu(x + self.bn(y))


def join_centres(weights: Tensor, dilations: Sequence[int]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
    """Weights (B, G, R, 9, H, W) with the middle taps, the same cell for every dilation, added into one.

    Returns (B, G, K, H, W) with K = 8 R + 1 and the K offsets (rows, columns).
    """
    around = [q for q in range(9) if q != 4]
    middle = weights[:, :, :, 4].sum(2, keepdim=True)
    outer = torch.cat([weights[:, :, :, :4], weights[:, :, :, 5:]], dim=3).flatten(2, 3)
    offsets = [(TAPS[q][0] * d, TAPS[q][1] * d) for d in dilations for q in around]
    return torch.cat([outer, middle], dim=2), (*offsets, (0, 0))


def gather_taps(value: Tensor, weights: Tensor, offsets: Sequence[tuple[int, int]]) -> Tensor:
    """``y_c(p) = sum_k weights_{g(c), k}(p) value_c(p + offset_k)``, zeros outside.

    Args:
        value: (B, C, H, W). weights: (B, G, K, H, W), one set for each of G groups of channels. offsets: K of (row, column),
            the last one (0, 0).
    """
    return _GatherTaps.apply(value.contiguous(), weights.to(value.dtype).contiguous(), tuple(offsets))


# On a CPU so many numbers of the value are treated at once: what a core's second-level cache keeps beside weights and result.
CHUNK = 2**17


class _GatherTaps(torch.autograd.Function):
    """Loops over the taps with shifted views instead of unfolding K copies of the value.

    Rows are padded and laid end to end, so that every shift is a shift along one contiguous axis.
    """

    @staticmethod
    def forward(ctx, value: Tensor, weights: Tensor, offsets: tuple[tuple[int, int], ...]) -> Tensor:
        layout = _Layout(value, weights, offsets)
        out = value.new_empty(layout.parts, layout.width, layout.length)
        for part in layout.chunks():
            v, w, o = layout.pad(value, part), layout.widen(weights, part), out[part]
            torch.mul(w[:, -1, None], v[..., layout.lead : layout.lead + layout.length], out=o)
            for k, start in enumerate(layout.starts[:-1]):
                o.addcmul_(w[:, k, None], v[..., start : start + layout.length])
        ctx.save_for_backward(value, weights)
        ctx.offsets = offsets
        return layout.crop(out).reshape(value.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        value, weights = ctx.saved_tensors
        layout = _Layout(value, weights, ctx.offsets)
        grad_value, grad_weights = torch.empty_like(value), torch.empty_like(weights)
        by_part = grad_value.view(layout.parts, layout.width, *value.shape[2:])
        weights_by_part = grad_weights.view(layout.parts, -1, *value.shape[2:])
        for part in layout.chunks():
            v, w, g = layout.pad(value, part), layout.widen(weights, part), layout.widen(grad, part)
            gv, gw, product = torch.zeros_like(v), torch.empty_like(w), torch.empty_like(g)
            for k, start in enumerate(layout.starts):
                span = slice(start, start + layout.length)
                gv[..., span].addcmul_(w[:, k, None], g)
                torch.mul(g, v[..., span], out=product)
                torch.sum(product, dim=1, out=gw[:, k])
            by_part[part] = layout.crop(gv[..., layout.lead : layout.lead + layout.length])
            weights_by_part[part] = layout.crop(gw)
        return grad_value, grad_weights, None


class _Layout:
    """Rows of width W + 2 m laid end to end, m being the furthest offset, with m empty rows before and after; a part is one
    group of channels of one sample."""

    def __init__(self, value: Tensor, weights: Tensor, offsets: Sequence[tuple[int, int]]):
        groups = weights.shape[1]
        self.height, self.columns = value.shape[2:]
        self.parts, self.width = len(value) * groups, value.shape[1] // groups
        self.margin = max(max(abs(dy), abs(dx)) for dy, dx in offsets)
        stride = self.columns + 2 * self.margin
        self.length = self.height * stride
        # One more margin at either end: a diagonal shift of the first or last cells runs past the padded rows.
        self.lead = self.margin * stride + self.margin
        self.starts = [self.lead + dy * stride + dx for dy, dx in offsets]
        on_cpu = value.device.type == "cpu"
        self.step = max(1, CHUNK // (self.width * self.length)) if on_cpu else self.parts

    def chunks(self):
        return [slice(first, first + self.step) for first in range(0, self.parts, self.step)]

    def pad(self, value: Tensor, part: slice) -> Tensor:
        """(B, C, H, W) to the part's (n, C / G, lead + length + lead)."""
        mine = value.reshape(self.parts, self.width, self.height, self.columns)[part]
        out = value.new_zeros(len(mine), self.width, self.length + 2 * self.lead)
        self.crop(out[..., self.lead : self.lead + self.length]).copy_(mine)
        return out

    def widen(self, x: Tensor, part: slice) -> Tensor:
        """(B, ..., H, W) to the part's (n, ..., length), zeros in the margins."""
        mine = x.reshape(self.parts, -1, self.height, self.columns)[part]
        return F.pad(mine, (0, 2 * self.margin)).flatten(-2)

    def crop(self, flat: Tensor) -> Tensor:
        """The inverse of :meth:`widen`, as a view."""
        return flat.unflatten(-1, (self.height, self.columns + 2 * self.margin))[..., : self.columns]
