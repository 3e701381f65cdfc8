"""Sizes by device, with the memory of a GPU that is not there."""

import pytest
import torch

from models import sizes
from models.sizes import LOGITS, QUEUE, SCORES, Tile, fits, hidden_rows

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def free(monkeypatch):
    """Sets the memory that a GPU has free, in gigabytes."""
    return lambda gigabytes: monkeypatch.setattr(sizes, "free_bytes", lambda device: int(gigabytes * 1e9))


@pytest.mark.parametrize(("gigabytes", "entries"), [(130, 2**28), (10, 2**27), (4, 2**25), (0.1, 2**22)])
def test_tiles_of_a_gpu_follow_its_free_memory(free, gigabytes, entries):
    free(gigabytes)
    assert LOGITS.entries(GPU) == entries
    assert LOGITS.entries(CPU) == 2**22


def test_a_tile_takes_its_share_at_most(free):
    for gigabytes in (1, 3, 7, 20, 60, 140):
        free(gigabytes)
        for tile in (LOGITS, SCORES, QUEUE):
            entries = tile.entries(GPU)
            assert entries == tile.cpu or entries * tile.bytes_per_entry <= sizes.GPU_SHARE * gigabytes * 1e9


def test_what_fits_comfortably_is_one_tile(free):
    free(60)
    for pairs in (1024, 4096, 16384):
        assert LOGITS.rows(GPU, pairs) >= pairs
    assert SCORES.rows(GPU, 25000) >= 5000
    assert QUEUE.rows(GPU, 3 * 32) >= 65536


def test_a_tile_has_a_row_at_least():
    assert Tile(4, 4).rows(CPU, 100) == 1
    assert Tile(4, 4).rows(CPU, 0) == 4


def test_rows_of_the_gated_projector(free):
    free(130)
    assert hidden_rows(GPU, 32768, 8 * 1536, 2) == 32768
    free(10)
    assert hidden_rows(GPU, 32768, 8 * 1536, 2) == 16384
    free(0.001)
    assert hidden_rows(GPU, 32768, 8 * 1536, 2) == 512
    assert hidden_rows(CPU, 32768, 8 * 1536, 4) == 512


def test_a_larger_form_is_for_gpus_with_room(free):
    free(8)
    assert fits(GPU, 10**9) and not fits(GPU, 3 * 10**9) and not fits(CPU, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_free_memory_counts_what_torch_holds_in_reserve():
    before = sizes.free_bytes(GPU)
    block = torch.empty(2**28, dtype=torch.uint8, device=GPU)
    assert sizes.free_bytes(GPU) <= before - 2**27
    del block
    assert sizes.free_bytes(GPU) >= before - 2**27
