"""DINOv2's objectives: teacher targets by Sinkhorn-Knopp or centring, DINO and iBOT cross-entropies, KoLeo (arXiv 2304.07193).

Shapes: n rows (class tokens or masked patches) of this process, K prototypes, B images per process.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from models.layers.autocast import add_product, product_dtype
from models.losses.fused import kernels_for
from models.losses.gather import world_size
from models.sizes import PROTOTYPES

STUDENT_TEMPERATURE = 0.1
ITERATIONS = 3  # of Sinkhorn-Knopp


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temperature: float, iterations: int = ITERATIONS, overwrite: bool = False) -> Tensor:
    """Targets (n, K) float32 whose rows sum to 1 and whose columns are balanced over the rows of all processes.

    The official code divides a K x n matrix by its row and column sums in turn. Here the matrix stays as it is and the
    factors of rows and columns are iterated instead, which reads it half as often. The divisions by K and by the number of
    rows cancel in the result. The largest logit is subtracted first, which the divisions cancel: at low temperatures the
    exponential would overflow.

    Args:
        logits: (n, K) of the teacher; processes may have different numbers of rows, also none.
        temperature: of the teacher.
        iterations: of the alternation; official: 3.
        overwrite: put the targets into the place of float32 logits, so that no second matrix is held.
    """
    q = logits.float()
    q = q.clone() if q is logits and not overwrite else q
    largest = _over_processes(q.amax() if len(q) else q.new_tensor(-torch.inf), dist.ReduceOp.MAX)
    q.sub_(largest).div_(temperature).exp_()
    of_row, of_prototype = q.new_ones(len(q)), q.new_ones(q.shape[1])
    for _ in range(iterations):
        of_prototype = _inverse(_over_processes(of_row @ q))
        of_row = _inverse(q @ of_prototype)
    return q.mul_(of_prototype).mul_(of_row[:, None])


class CentredTargets(nn.Module):
    """Softmax of logits less a centre, which is an average of the batches before (DINO, arXiv 2104.14294).

    The official code holds the mean of a step back and adds it at the next call. Here it is added at once, after the targets
    were computed: the targets are the same, and a checkpoint holds the mean of its last step. Processes count alike in the
    mean, whatever their numbers of rows.

    Args:
        shape: of the centre; officially (1, K) for class tokens and (1, 1, K) for patches.
        momentum: factor of the old centre.
    """

    center: Tensor

    def __init__(self, shape: tuple[int, ...], momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(shape))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float, move: bool = True) -> Tensor:
        """Logits (n, K) to targets (n, K) float32, then, with ``move``, shift the centre towards the rows' mean."""
        targets = ((logits.float() - self.center.reshape(1, -1)) / temperature).softmax(dim=-1)
        if not move:
            return targets
        mean = logits.float().mean(dim=0) if len(logits) else self.center.reshape(-1).clone()
        self.center.lerp_((_over_processes(mean) / world_size()).reshape(self.center.shape), 1 - self.momentum)
        return targets


class _PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        weight: Tensor,
        targets: Tensor,
        row_weights: Tensor,
        temperature: float,
        target_of: Tensor | None,
    ) -> Tensor:
        dtype = product_dtype(unit.device, unit.dtype)
        x, prototypes = unit.to(dtype), weight.to(dtype)
        total = unit.new_zeros((), dtype=torch.float32)
        of_unit, of_weight = torch.empty_like(unit), torch.zeros_like(weight, dtype=torch.float32)
        passes: Any = kernels_for(x) or sys.modules[__name__]
        step = PROTOTYPES.rows(x.device, len(prototypes))
        with torch.autocast(unit.device.type, enabled=False):
            for first in range(0, len(x), step):
                rows = slice(first, first + step)
                of_rows = (targets[rows], None) if target_of is None else (targets, target_of[rows])
                loss, slope = passes.cross_entropy_pass(x[rows] @ prototypes.T, *of_rows, row_weights[rows], temperature)
                total += loss
                of_unit[rows] = (slope @ prototypes).to(of_unit.dtype)
                add_product(of_weight, slope.T, x[rows])
        ctx.save_for_backward(of_unit, of_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_unit, of_weight = ctx.saved_tensors
        return of_unit * gradient.to(of_unit.dtype), of_weight * gradient.to(of_weight.dtype), None, None, None, None


def cross_entropy_pass(
    logits: Tensor, targets: Tensor, target_of: Tensor | None, row_weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """``sum_n row_weights_n H(targets_n, softmax(logits_n / temperature))`` and its derivative by the logits.

    Args:
        logits: (b, K) a product in any type.
        targets: (m, K) float32.
        target_of: (b,) the row of ``targets`` of each row; None: they are in order.
        row_weights: (b,) float32.
        temperature: of the softmax.

    Returns:
        The sum in float32, and (b, K) in the type of the logits, which may lie in their place.
    """
    x = logits.float().div_(temperature)
    target = targets if target_of is None else targets[target_of]
    mass = target.sum(dim=1)
    log_sum = x.logsumexp(dim=1)
    loss = (row_weights * (log_sum * mass - torch.linalg.vecdot(target, x))).sum()
    slope = x.sub_(log_sum[:, None]).exp_().mul_(mass[:, None]).sub_(target)
    return loss, slope.mul_((row_weights / temperature)[:, None]).to(logits.dtype)


def prototype_loss(
    unit: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    temperature: float = STUDENT_TEMPERATURE,
    target_of: Tensor | None = None,
) -> Tensor:
    """``sum_n row_weights_n H(targets_n, softmax(unit_n weight^T / temperature))``, the cross-entropy of DINO and iBOT.

    The student's logits exist for some rows at a time, and the gradients are computed beside them: of the n x K matrices only
    the targets are held. Without a gradient of a gradient.

    Args:
        unit: (n, D) what the prototypes are compared with.
        weight: (K, D) prototypes.
        targets: (n, K) float32; rows may sum to any mass.
        row_weights: (n,) float32: one over the number of rows for a mean.
        temperature: of the student.
        target_of: (n,) the row of ``targets`` that belongs to each row, where several share one; None: they are in order.
    """
    return _PrototypeLoss.apply(unit, weight, targets, row_weights, temperature, target_of)


def koleo(features: Tensor, eps: float = 1e-8) -> Tensor:
    """Kozachenko-Leonenko regulariser: minus the mean log distance of unit vectors to their nearest neighbour.

    Args:
        features: (B, D) class tokens of one view, of this process alone; at least two.
        eps: added to each component of the difference and to the distance, as officially.
    """
    with torch.autocast(features.device.type, enabled=False):
        x = F.normalize(features.float(), dim=-1, eps=eps)
        with torch.no_grad():
            similarity = x @ x.T
            nearest = similarity.fill_diagonal_(-1).argmax(dim=1)
        distance = (x - x[nearest] + eps).norm(dim=-1)
        return -(distance + eps).log().mean()


def _inverse(sums: Tensor) -> Tensor:
    """One over the sums; a prototype or a row of which nothing is left after the exponential stays without mass."""
    return 1 / sums.clamp_min(torch.finfo(sums.dtype).tiny)


def _over_processes(value: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(value, op=operation)
    return value
