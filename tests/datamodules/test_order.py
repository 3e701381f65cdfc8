"""The training order: complete, reproducible, the same however it is sliced."""

import numpy as np
import pytest
from scipy.stats import chisquare

from datamodules.order import HeldOutBatches, OrderedBatches, draw, epoch_order


def rows(sampler) -> list[list[int]]:
    return [request.rows.tolist() for request in sampler]


def test_epoch_order_is_a_pure_permutation():
    first = epoch_order(100, seed=3, epoch=5)
    np.testing.assert_array_equal(first, epoch_order(100, seed=3, epoch=5))
    assert sorted(first.tolist()) == list(range(100))
    assert first.tolist() != epoch_order(100, seed=3, epoch=6).tolist()
    assert first.tolist() != epoch_order(100, seed=4, epoch=5).tolist()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_slice_one_global_batch(world_size):
    whole = rows(OrderedBatches(50, 12, seed=1))
    share = 12 // world_size
    parts = [rows(OrderedBatches(50, share, seed=1, rank=r, world_size=world_size)) for r in range(world_size)]
    assert [sum(pieces, []) for pieces in zip(*parts, strict=True)] == whole
    assert len(whole) == len(OrderedBatches(50, 12, seed=1)) == 4


def test_last_batch_without_drop_last():
    sampler = OrderedBatches(10, 4, shuffle=False, drop_last=False)
    assert rows(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]] and len(sampler) == 3
    ranks = [rows(OrderedBatches(7, 2, shuffle=False, drop_last=False, rank=r, world_size=2)) for r in range(2)]
    assert ranks == [[[0, 1], [4, 5]], [[2, 3], [6, 4]]]  # three samples are left for two ranks: one is repeated


def test_starts_where_the_position_says():
    position = (3, 2)
    resumed = OrderedBatches(20, 4, seed=2, position=lambda: position)
    whole = OrderedBatches(20, 4, seed=2, position=lambda: (3, 0))
    assert rows(resumed) == rows(whole)[2:] and len(resumed) == 5
    iterator = iter(resumed)
    position = (4, 0)  # only later iterations see it
    assert [request.rows.tolist() for request in iterator] == rows(whole)[2:]
    assert rows(resumed) == rows(OrderedBatches(20, 4, seed=2, position=lambda: (4, 0)))
    assert next(iter(resumed)).epoch == 4


def test_draws_are_pure_uniform_and_independent_of_company():
    index = np.arange(40000)
    choices = np.full(40000, 5)
    drawn = draw(choices, index, seed=1, epoch=2)
    np.testing.assert_array_equal(drawn[::7], draw(choices[::7], index[::7], seed=1, epoch=2))
    assert chisquare(np.bincount(drawn, minlength=5)).pvalue > 1e-3
    again = draw(choices, index, seed=1, epoch=3)
    assert chisquare(np.bincount(drawn * 5 + again, minlength=25)).pvalue > 1e-3


@pytest.mark.parametrize("size", [1, 4, 20, 21])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_held_out_batches_are_those_of_one_process(size, world_size):
    alone = [request.rows.tolist() for request in HeldOutBatches(size, 4)]
    assert sum(alone, []) == list(range(size))
    ranks = [[r.rows.tolist() for r in HeldOutBatches(size, 4, rank, world_size)] for rank in range(world_size)]
    assert len({len(of_rank) for of_rank in ranks}) == 1  # collectives stay in step
    for rank, of_rank in enumerate(ranks):
        own = alone[rank::world_size]
        assert of_rank[: len(own)] == own and all(repeat == alone[-1] for repeat in of_rank[len(own) :])
