"""``trainer=fsdp``: the layers of large towers are spread over the ranks, by PyTorch's FSDP2.

Y. Zhao et al., "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel", arXiv 2304.11277.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Adafactor, Optimizer

from experiments.run.activations import repeated_blocks
from models.errors import UserError
from models.sharded import Part, part_of, whole_of


class ShardedBlocks(DDPStrategy):
    """Shards every repeated block of a module: weights, gradients and the optimiser's state. The rest is as under DDP.

    A block is gathered for its own forward and backward pass alone. What is no repeated block (embeddings, heads,
    temperatures, queues) is whole on every rank, and its gradients are averaged after the backward pass, so that methods may
    change it as they like.

    Checkpoints hold whole tensors, those of one process: they are read under any number of ranks and any strategy.

    Args:
        reshard_after_forward: whether a block gives its whole weights back between its forward and its backward pass. False
            needs more memory and gathers them once.
    """

    def __init__(self, reshard_after_forward: bool = True):
        super().__init__()
        self.reshard_after_forward = reshard_after_forward
        self.blocks: list[nn.Module] = []
        self.parts: list[Part] = []
        self.averaged: list[nn.Parameter] = []  # trained and whole on every rank
        self.statistics: list[Tensor] = []  # of batch normalisation: those of rank 0 count, as under DDP
        self.last_piece = True  # of the batches whose gradients are accumulated

    @staticmethod
    def conflicts(config: Mapping[str, Any]) -> list[str]:
        """Problems of a whole configuration that cannot be trained in shards."""
        problems = []
        if str(config["trainer"].get("precision")) in ("16-mixed", "16"):
            problems.append(
                "trainer.precision: float16 scales the loss by what it finds in all gradients, of which a rank sees a part. "
                "Train in bf16-mixed, or with trainer=ddp."
            )
        if config.get("compile"):
            problems.append("compile: torch.compile and trainer=fsdp have not been made to work together. Set compile=false.")
        return problems

    # ---- before the training --------------------------------------------------------------------------------------

    def configure_ddp(self) -> None:
        """Shard the module in place. Lightning calls it before the optimiser is made."""
        module: Any = self.lightning_module
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.data, 0)
        self.blocks = [block for block in repeated_blocks(module, _can_be_sharded)]
        inside = {parameter for block in self.blocks for parameter in block.parameters()}
        outside = {parameter for parameter in module.parameters() if parameter not in inside}
        self.averaged = [p for p in module.parameters() if p.requires_grad and p in outside]
        norms = (part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
        self.statistics = [buffer for norm in norms for buffer in norm.buffers()]
        if not self.blocks:
            return
        for block in self.blocks:
            fully_shard(block, reshard_after_forward=self.reshard_after_forward)
        # A step is what FSDP2 takes for the forward pass of the whole: it may call any method of its networks.
        fully_shard(module, ignored_params=outside)
        register_fsdp_forward_method(module, "shared_step")

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        self.parts = []
        for optimizer in self.optimizers:
            if isinstance(optimizer, LBFGS | Adafactor):
                raise UserError(
                    f"optimizer: {type(optimizer).__name__} looks at whole matrices, of which a rank holds a part under "
                    "trainer=fsdp. Choose another optimizer, or trainer=ddp."
                )
            for group in optimizer.param_groups:
                group["params"] = [Part(p) if isinstance(p, DTensor) else p for p in group["params"]]
                self.parts += [p for p in group["params"] if isinstance(p, Part)]

    # ---- steps ----------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        for tensor in self.statistics:
            dist.broadcast(tensor, 0)
        return super().training_step(*args, **kwargs)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        self.last_piece = False
        try:
            yield
        finally:
            self.last_piece = True

    def pre_backward(self, closure_loss: Tensor) -> None:
        for part in self.parts:
            if part.grad is None:  # the optimiser has forgotten it
                part.sharded.grad = None

    def post_backward(self, closure_loss: Tensor) -> None:
        for part in self.parts:
            gradient: Any = part.sharded.grad
            part.grad = None if gradient is None else gradient.to_local()
        if self.last_piece:
            self._average_gradients()

    @torch.no_grad()
    def _average_gradients(self) -> None:
        """One exchange for each number type. A rank that has not used a parameter counts with a gradient of 0."""
        for dtype in {p.dtype for p in self.averaged}:
            gradients = []
            for p in (p for p in self.averaged if p.dtype == dtype):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                gradients.append(p.grad)
            joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(joined)
            pieces = (joined / self.world_size).split([gradient.numel() for gradient in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))

    # ---- checkpoints: whole tensors, on rank 0 ------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        module: Any = self.lightning_module
        return self._gathered({name: (value.detach(), value.detach()) for name, value in module.state_dict().items()})

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: Any = super().optimizer_state(optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for number, values in state["state"].items():
            part = parameters[number]
            of_parts = {name: (value, _like(part, value, part)) for name, value in values.items()}
            state["state"][number] = self._gathered(of_parts)
        return state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {}
            for number, values in saved["state"].items():
                part = parameters[number]
                whole = part.sharded if isinstance(part, Part) else part
                state[number] = {name: part_of(value, _like(part, value, whole)) for name, value in values.items()}
            states.append({**saved, "state": state})
        super().load_optimizer_state_dict({"optimizer_states": states})

    def _gathered(self, values: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
        """Whole tensors, one after the other so that only one at a time needs memory on the device; other ranks keep none.

        Args:
            values: name -> value, and the tensor it is sharded like.
        """
        gathered = {}
        for name, (value, like) in values.items():
            if isinstance(like, DTensor):
                whole = value.full_tensor() if isinstance(value, DTensor) else whole_of(value, like)
                value = whole.cpu() if self.is_global_zero else whole.new_empty(0)
            gathered[name] = value
        return gathered


def _like(parameter: nn.Parameter, value: Any, shaped: Any) -> Any:
    """What an entry of the optimiser's state is sharded like: the parameter, if it has the shape of ``shaped``."""
    if isinstance(parameter, Part) and isinstance(value, Tensor) and value.shape == shaped.shape:
        return parameter.sharded
    return value


def _can_be_sharded(block: nn.Module) -> bool:
    """It has no batch normalisation: such blocks are small, and networks may leave them out on some ranks."""
    return not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in block.modules())
