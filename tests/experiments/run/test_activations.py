"""Blocks that are computed again in the backward pass change no loss and no weight, and keep less for it."""

import copy

import pytest
import torch

from experiments.run.activations import _can_be_recomputed, recompute_blocks, repeated_blocks
from tests.lightning_modules.small import MODULES, Data, built, trainer

WITH_BLOCKS = [name for name in MODULES if any(True for _ in repeated_blocks(built(name), _can_be_recomputed))]


def _trained(name: str, recomputed: bool, path) -> tuple[dict, int]:
    """The state after two steps with dropout, and the bytes that were saved for the backward pass."""
    module = built(name).train()
    blocks = recompute_blocks(module) if recomputed else []
    saved = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved += tensor.nbytes
        return tensor

    torch.manual_seed(3)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fitter = trainer(default_root_dir=path, max_steps=2, limit_val_batches=0)
        fitter.fit(module, datamodule=Data(name, 6, 12, 6))
    assert all(block.recomputed for block in blocks), "a block is called past its forward"
    return module.state_dict(), saved


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_training_is_the_same_and_keeps_less(name, tmp_path):
    plain, plain_bytes = _trained(name, False, tmp_path)
    recomputed, recomputed_bytes = _trained(name, True, tmp_path)
    assert plain.keys() == recomputed.keys()
    for key, value in plain.items():
        torch.testing.assert_close(recomputed[key], value, msg=key)
    assert recomputed_bytes < plain_bytes


def test_the_families_of_transformers_have_blocks():
    assert {"all_in_one", "arl", "hammer", "mm_lego", "rad_dino", "two_tower", "llava_manager"} <= set(WITH_BLOCKS)


def test_blocks_of_one_modality_each_are_towers():
    assert {type(block).__name__ for block in repeated_blocks(built("mm_lego"))} == {"Step"}


def test_blocks_with_batch_normalisation_are_left_out():
    """Computed twice, they would count each batch twice."""
    blocks = [torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)) for _ in range(2)]
    network = torch.nn.Sequential(torch.nn.Sequential(*blocks), torch.nn.Linear(2, 2))
    assert len(list(repeated_blocks(network))) == 2 and not recompute_blocks(network)


def test_a_copy_runs_its_own_weights():
    network = torch.nn.Sequential(
        torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU()) for _ in range(2)])
    )
    recompute_blocks(network)
    copied = copy.deepcopy(network)
    torch.nn.init.zeros_(copied[0][0][0].weight)
    torch.nn.init.zeros_(copied[0][0][0].bias)
    assert not copied[0][0](torch.ones(1, 2)).any()
