"""Held-out losses and metrics of two real processes over gloo are those of one process, whatever the size of the split."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.lightning_modules.small import MODULES, Data, built, free_port, rank_environment, trainer

RANKS, BATCH = 2, 4
HELD_OUT = 21  # five batches of 4 and one of 1: three for each rank; of all devices together batches of 8, 8 and 5
TRAINED = 8  # two steps of one process, one of two
# The other modules draw at random in a step (dropout, pairings, masks) or take means over the samples of one rank, as the
# official codes do: normalisation statistics, KoLeo, DICE, masked patches, queues.
EXACT = ("alignment", "llava_manager")
pytestmark = pytest.mark.ddp


def _validate(name: str, batch_size: int, held_out: int, **options) -> dict[str, float]:
    fitter = trainer(**options)
    fitter.validate(built(name), datamodule=Data(name, batch_size, TRAINED, held_out), verbose=False)
    return {key: float(value) for key, value in fitter.callback_metrics.items()}


def _fit(name: str, batch_size: int, **options) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The held-out numbers and the weights after two steps. Plain DDP stops for a parameter without a gradient."""
    module, fitter = built(name), trainer(max_epochs=2, num_sanity_val_steps=0, **options)
    if name == "alignment":
        module.regulariser = None  # it compares the samples of one rank, as the official code does
    fitter.fit(module, datamodule=Data(name, batch_size, TRAINED, 5))
    metrics = {key: float(value) for key, value in fitter.callback_metrics.items() if key.startswith("val/")}
    return metrics, {key: value.numpy().copy() for key, value in module.state_dict().items()}


def _rank(rank: int, port: int, queue) -> None:
    torch.set_num_threads(1)
    os.environ |= rank_environment(rank, RANKS, port)
    for name in MODULES:
        ranks = {"devices": RANKS, "strategy": "ddp"}
        held_out = {size: _validate(name, BATCH, size, **ranks) for size in (HELD_OUT, 3)}
        queue.put((rank, name, held_out, _fit(name, BATCH, **ranks) if name != "csa" else None))
    dist.barrier()  # a rank that leaves while another still exchanges aborts it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks() -> dict[tuple[int, str], tuple]:
    port = free_port()
    queue = mp.get_context("spawn").SimpleQueue()
    context = mp.spawn(_rank, (port, queue), nprocs=RANKS, join=False)
    results = {}
    for _ in range(RANKS * len(MODULES)):
        while queue.empty() and not context.join(timeout=0.2):
            pass
        rank, name, *values = queue.get()
        results[rank, name] = tuple(values)
    return results


@pytest.mark.parametrize("size", (HELD_OUT, 3))
@pytest.mark.parametrize("name", MODULES)
def test_two_ranks_judge_as_one_process(of_ranks, name, size):
    alone = _validate(name, BATCH * RANKS if MODULES[name].together else BATCH, size, devices=1)
    assert {"val/loss"} < alone.keys()
    for rank in range(RANKS):
        assert of_ranks[rank, name][0][size] == pytest.approx(alone, rel=1e-5, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("name", [name for name in MODULES if name != "csa"])
def test_every_module_trains_under_plain_ddp_and_ranks_agree(of_ranks, name):
    first, second = (of_ranks[rank, name][1][0] for rank in range(RANKS))
    assert first == second and "val/loss" in first


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_train_as_one_process_with_both_batches(of_ranks, name):
    _, alone = _fit(name, BATCH * RANKS, devices=1)
    _, weights = of_ranks[0, name][1]
    assert weights.keys() == alone.keys()
    assert any(not np.array_equal(value, alone[key]) for key, value in built(name).state_dict().items())
    for key, value in alone.items():
        np.testing.assert_allclose(weights[key], value, rtol=1e-4, atol=1e-6, err_msg=key)


def test_another_batch_is_another_loss():
    """The comparison can fail: a contrastive loss depends on its batch."""
    losses = [_validate("alignment", size, HELD_OUT, devices=1)["val/loss"] for size in (BATCH, BATCH * RANKS)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-2)
