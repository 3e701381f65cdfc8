"""Parameters of which each rank holds a part, for code that goes through the parameters of a network.

FSDP2 makes such parameters ``DTensor``. Outside the forward pass of their module they cannot meet plain tensors in one
operation; the functions here take both.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """What this rank holds of ``tensor``, in the same memory: the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of ``whole``, a tensor that all ranks hold, sharded as ``like`` is."""
    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None).to_local()


@torch.no_grad()
def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """The tensor whose parts the ranks hold, sharded as ``like`` is. All ranks must call it."""
    if not isinstance(like, DTensor):
        return part
    options: Any = {"run_check": False, "shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part, like.device_mesh, like.placements, **options).full_tensor()


def sum_of(tensor: Tensor) -> Tensor:
    """The sum of all entries, with a gradient, as a plain scalar on every rank."""
    total = tensor.sum()
    return total.full_tensor() if isinstance(total, DTensor) else total


class Part(nn.Parameter):
    """What this rank holds of a sharded parameter, as a plain leaf in the same memory: what an optimiser takes.

    Optimisers run one kernel for many parameters, in which plain and sharded ones cannot be together.

    Args:
        sharded: the parameter of the network.
    """

    sharded: DTensor

    def __new__(cls, sharded: DTensor) -> Part:
        part = super().__new__(cls, local(sharded.detach()), requires_grad=True)
        part.sharded = sharded
        return part


def gradient_norms(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The L2 norm of each gradient, over all ranks where the parameter is sharded. All of them must have gradients."""
    parameters = list(parameters)
    norms = list(torch._foreach_norm([local(p.grad) for p in parameters]))  # type: ignore[arg-type]
    sharded = [number for number, p in enumerate(parameters) if isinstance(p, DTensor | Part)]
    if sharded:
        first: Any = parameters[sharded[0]]
        squares = torch.stack([norms[number].square() for number in sharded])
        mesh = (first.sharded if isinstance(first, Part) else first).device_mesh
        dist.all_reduce(squares, group=mesh.get_group())
        for number, square in zip(sharded, squares, strict=True):
            norms[number] = square.sqrt()
    return norms
