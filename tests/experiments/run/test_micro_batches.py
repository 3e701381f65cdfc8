"""Networks that run piece by piece give the losses and gradients of the whole batch, and need less memory for them."""

import os
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiments.run.activations import recompute_blocks
from experiments.run.compilation import compile_networks
from experiments.run.micro_batches import MicroBatches
from experiments.run.sharding import ShardedBlocks
from lightning_modules.alignment import AlignmentModule
from lightning_modules.base import BaseModule
from models.alignment.batch import IMAGE_TOKENS, TEXT_MASK, TEXT_TOKENS
from models.alignment.projectors import TokenProjector
from models.batch import INDEX
from models.errors import UserError
from models.freeze_align.head import TokenAlignmentHead
from models.losses.contrastive import InfoNCELoss
from tests.experiments.launch import launch
from tests.lightning_modules.small import MODULES, Data, built, free_port, rank_environment, trainer

BATCH, RANKS = 6, 2
CUT = [name for name in MODULES if built(name).row_wise()]


class PeakMemory(TorchDispatchMode):
    """The most bytes that tensors made in it have held together."""

    def __init__(self):
        super().__init__()
        self.known: set[int] = set()
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self.bytes)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.known:
            self.known.add(address)
            self.bytes += size
            weakref.finalize(storage, self._forget, address, size)

    def _forget(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.bytes -= size


def without_draws(module: torch.nn.Module) -> torch.nn.Module:
    """With no dropout, stochastic depth or noise: pieces would draw others than the whole batch."""
    for part in module.modules():
        for name in ("p", "dropout", "drop_prob", "drop_path", "noise"):
            if isinstance(getattr(part, name, None), float | bool):
                setattr(part, name, 0.0)
    return module


def in_pieces(name: str, size: int | None, recomputed: bool = False) -> BaseModule:
    module = without_draws(built(name))
    if recomputed:
        recompute_blocks(module)
    if size is not None:
        MicroBatches(size).install(module)
    return module


def one_step(name: str, size: int | None, path, compiled: bool = False, **options) -> tuple[dict, dict]:
    """Losses and gradients of a training step."""
    module, gradients = in_pieces(name, size, **options), {}
    if compiled:
        compile_networks(module, backend="eager")
    module.on_after_backward = lambda: gradients.update(
        {key: p.grad.clone() for key, p in module.named_parameters() if p.grad is not None}
    )
    torch.manual_seed(3)
    fitter = trainer(default_root_dir=path, max_steps=1, limit_val_batches=0)
    fitter.fit(module, datamodule=Data(name, BATCH, BATCH, BATCH))
    return {key: float(value) for key, value in fitter.callback_metrics.items()}, gradients


@pytest.mark.parametrize("name", CUT)
def test_losses_and_gradients_are_those_of_the_whole_batch(name, tmp_path):
    losses, gradients = one_step(name, None, tmp_path)
    for size, recomputed in ((2, False), (4, True)):
        losses_of_pieces, gradients_of_pieces = one_step(name, size, tmp_path, recomputed=recomputed)
        assert losses_of_pieces == pytest.approx(losses, rel=1e-5, abs=1e-6)
        assert gradients_of_pieces.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert (gradients_of_pieces[key] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7, key


def test_heads_that_take_tokens():
    projector = partial(TokenProjector, dropout=0.0)
    head = partial(TokenAlignmentHead, embed_dim=4, local_vision=projector, cls_vision=projector, local_text=projector)
    module = AlignmentModule(head, InfoNCELoss(), vision_dim=6, text_dim=5)
    mask = torch.arange(7) < torch.tensor([3, 7, 2, 5, 1])[:, None]
    batch = {INDEX: torch.arange(5), IMAGE_TOKENS: torch.randn(5, 9, 6), TEXT_TOKENS: torch.randn(5, 7, 5), TEXT_MASK: mask}
    whole = torch.autograd.grad(module.batch_loss(batch), list(module.parameters()), materialize_grads=True)
    pieces = MicroBatches(2)
    pieces.install(module)
    torch.testing.assert_close(
        torch.autograd.grad(module.batch_loss(batch), list(module.parameters()), materialize_grads=True), whole
    )
    assert pieces.cut


def test_families_whose_losses_compare_samples_are_cut():
    assert {"alignment", "csa", "all_in_one", "arl", "hammer", "rad_dino", "two_tower", "two_tower_hard"} <= set(CUT)


@pytest.mark.parametrize("name", ("all_in_one", "two_tower_texts"))
def test_a_step_needs_less_memory(name):
    data = Data(name, 24, 24, 24)
    batch, peaks = next(iter(data.train_dataloader())), []
    for size in (None, 2):
        module = in_pieces(name, size).train()
        with PeakMemory() as memory:
            module.batch_loss(batch).backward()
        peaks.append(memory.peak)
    assert peaks[1] < 0.25 * peaks[0]


def test_the_backward_pass_takes_the_pieces_in_turn_and_draws_what_the_forward_pass_drew():
    module, drawn = built("alignment").train(), []
    dropout = torch.nn.Dropout(0.5)
    dropout.register_forward_hook(lambda module, inputs, out: drawn.append(out.detach()))
    module.head.vision_projector = torch.nn.Sequential(dropout, module.head.vision_projector)
    MicroBatches(2).install(module)
    module.head.encode_image(torch.randn(1, 6).expand(6, -1)).sum().backward()
    assert len(drawn) == 6 and not torch.equal(drawn[0], drawn[1])
    assert all(torch.equal(*pair) for pair in zip(drawn[:3], reversed(drawn[3:]), strict=True))


def test_without_gradients_nothing_is_computed_twice():
    module, calls = built("alignment"), []
    module.head.vision_projector.register_forward_hook(lambda *args: calls.append(1))
    MicroBatches(4).install(module)
    with torch.no_grad():
        assert len(module.head.encode_image(torch.randn(5, 6))) == 5
    assert len(calls) == 2


def test_compiled_networks_run_in_pieces(tmp_path):
    name = "radiograph_findings"
    losses, gradients = one_step(name, None, tmp_path)
    compiled = one_step(name, 4, tmp_path, compiled=True)
    assert compiled[0] == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(compiled[1], gradients)


def _rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, RANKS, port)
    for made, size, strategy in (("whole", None, "ddp"), ("ddp", 2, "ddp"), ("sharded", 2, ShardedBlocks())):
        fitter = trainer(default_root_dir=folder, max_steps=2, limit_val_batches=0, devices=RANKS, strategy=strategy)
        fitter.fit(in_pieces("all_in_one", size), datamodule=Data("all_in_one", BATCH, 4 * BATCH, BATCH))
        fitter.save_checkpoint(folder / made, weights_only=True)
    dist.barrier()  # a rank that leaves while another still exchanges aborts it
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_ranks_train_as_with_whole_batches(tmp_path):
    mp.spawn(_rank, (free_port(), tmp_path), nprocs=RANKS)
    whole, *others = (torch.load(tmp_path / made, weights_only=True)["state_dict"] for made in ("whole", "ddp", "sharded"))
    start = built("all_in_one").state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in whole.items())
    for weights in others:
        torch.testing.assert_close(weights, whole, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_cut_is_refused():
    with pytest.raises(UserError, match="accumulate_grad_batches"):
        MicroBatches(2).install(built("avgn"))
    module = built("alignment")
    module.head.vision_projector = torch.nn.Sequential(module.head.vision_projector, torch.nn.BatchNorm1d(4))
    with pytest.raises(UserError, match=r"'vision_projector.1' of AlignmentHead is batch normalisation"):
        MicroBatches(2).install(module)


def test_a_run_in_pieces_ends_with_the_weights_of_one_with_whole_batches(tmp_path):
    weights = []
    for size in (3, 8):
        done = launch(
            tmp_path, "experiment=sail_dinov2", "debug=tiny/alignment/default", "features.batch_size=8", "optimizer=sgd",
            "optimizer.lr=0.1", "stages=[prepare,encode,fit]", f"micro_batch_size={size}",
            f"paths.outputs={tmp_path / str(size)}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (run,) = (tmp_path / str(size) / "sail_dinov2").glob("*")
        assert ("NOTHING CUT" in (run / "run.log").read_text()) == (size == 8)
        weights.append(load_file(run / "checkpoints" / "last" / "weights.safetensors"))
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)
