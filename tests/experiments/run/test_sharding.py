"""``trainer=fsdp`` on two real processes over gloo: what DDP trains, checkpoints of any number of ranks, and refusals."""

import os
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from experiments.run.averaging import WeightAverage
from experiments.run.callbacks import RandomSteps
from experiments.run.checkpoint_io import DirectoryCheckpointIO
from experiments.run.sharding import ShardedBlocks
from models.errors import UserError
from models.io import read_tensors
from tests.experiments.run.toy import same
from tests.lightning_modules.small import Data, built, free_port, rank_environment, trainer

RANKS, EPOCHS = 2, 2
# With queues and momentum towers; with a penalty on all weights; with a teacher and clipping of its own.
TRAINED = ("hammer", "mm_lego_block", "rad_dino")
RESUMED = "hammer"  # which knows no total number of steps, so that a shorter training is the first half of a longer one
pytestmark = pytest.mark.ddp


def _fit(folder: Path, name: str, epochs: int = EPOCHS, resume: Path | None = None, **options) -> None:
    """Train with averaged weights, clipping and accumulation, and leave a checkpoint in ``folder``."""
    module = built(name)
    module.optimizer_factory = partial(torch.optim.AdamW, lr=1e-3, eps=1e-2)  # smooth, so that rounding stays rounding
    fitter = trainer(
        default_root_dir=folder, max_epochs=epochs, num_sanity_val_steps=0, gradient_clip_val=0.5, accumulate_grad_batches=2,
        callbacks=[WeightAverage(0.5, warm_up=False), RandomSteps(1)], plugins=[DirectoryCheckpointIO()], **options,
    )  # fmt: skip
    fitter.fit(module, datamodule=Data(name, 4, 16, 5), ckpt_path=resume, weights_only=True)
    if isinstance(fitter.strategy, ShardedBlocks):
        assert len(fitter.strategy.blocks) > 1 and fitter.strategy.parts
        assert all(part.numel() < part.sharded.numel() for part in fitter.strategy.parts if len(part.sharded) > 1)
    fitter.save_checkpoint(folder)


def _rank(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, RANKS, port)
    for name in TRAINED:
        _fit(folder / f"{name}-ddp", name, devices=RANKS, strategy="ddp")
        _fit(folder / f"{name}-sharded", name, devices=RANKS, strategy=ShardedBlocks())
    for made, epochs, resume in (("half", 1, None), ("resumed", EPOCHS, "half"), ("spread", 1, "alone")):
        _fit(folder / made, RESUMED, epochs, resume and folder / resume, devices=RANKS, strategy=ShardedBlocks())
    dist.barrier()  # a rank that leaves while another still exchanges aborts it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a checkpoint of each training."""
    folder = tmp_path_factory.mktemp("sharded")
    _fit(folder / "alone", RESUMED, epochs=1, devices=1)
    port = free_port()
    mp.spawn(_rank, (port, folder), nprocs=RANKS)
    _fit(folder / "gathered", RESUMED, epochs=1, resume=folder / "half", devices=1)
    return folder


def _state(folder: Path) -> dict:
    state = torch.load(folder / "trainer.pt", weights_only=True)
    names = ("optimizer_states", "lr_schedulers", "raw_weights", "global_step")
    return {"weights": read_tensors(folder / "weights.safetensors"), **{name: state[name] for name in names}}


@pytest.mark.parametrize("name", TRAINED)
def test_sharded_ranks_train_as_those_of_ddp(trained, name):
    ddp, sharded = _state(trained / f"{name}-ddp"), _state(trained / f"{name}-sharded")
    assert ddp["global_step"] == sharded["global_step"] == EPOCHS
    torch.testing.assert_close(sharded, ddp, rtol=1e-4, atol=1e-6)
    start = built(name).state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in ddp["weights"].items())


def test_a_resumed_sharded_run_equals_one_that_was_not_stopped(trained):
    assert same(_state(trained / "resumed"), _state(trained / f"{RESUMED}-sharded"))


@pytest.mark.parametrize(("read", "saved"), [("gathered", "half"), ("spread", "alone")])
def test_checkpoints_load_on_another_number_of_ranks(trained, read, saved):
    assert same(_state(trained / read), _state(trained / saved))


def test_what_cannot_be_sharded_is_refused():
    problems = ShardedBlocks.conflicts({"trainer": {"precision": "16-mixed"}, "compile": True})
    assert [problem.split(":")[0] for problem in problems] == ["trainer.precision", "compile"]
    assert not ShardedBlocks.conflicts({"trainer": {"precision": "bf16-mixed"}})
    module = built("alignment")
    module.optimizer_factory = torch.optim.Adafactor
    with pytest.raises(UserError, match="whole matrices"):
        trainer(devices=1, strategy=ShardedBlocks(), max_steps=1).fit(module, datamodule=Data("alignment", 4, 8, 4))
