"""Rows and losses of a split, joined over batches: each once, in order, and never numbers that mean nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lightning_modules.held_out import PADDING, HeldOut, check_weights, join_rows
from models.batch import INDEX
from models.errors import UserError
from tests.lightning_modules.small import Data


def rows(index: list[int], width: int = 2) -> dict[str, torch.Tensor]:
    column = torch.tensor(index)[:, None]
    return {INDEX: torch.tensor(index), "score": column / 2, "word": column.expand(-1, width)}


def test_rows_come_once_in_the_order_of_the_split():
    joined = join_rows([rows([4, 5]), rows([0, 2]), rows([4, 5])])
    assert joined[INDEX].tolist() == [0, 2, 4, 5]
    assert joined["score"].flatten().tolist() == [0, 1, 2, 2.5]


def test_shorter_rows_are_filled_with_the_ignored_label():
    joined = join_rows([rows([0], width=3), rows([1], width=1)])
    assert joined["word"].tolist() == [[0, 0, 0], [1, PADDING, PADDING]]


def test_maps_of_three_dimensions_keep_their_shape():
    joined = join_rows([{INDEX: torch.tensor([i]), "map": torch.full((1, 1 + i, 2), i)} for i in range(2)])
    assert joined["map"].tolist() == [[[0, 0], [PADDING, PADDING]], [[1, 1], [1, 1]]]


def test_losses_weigh_by_the_size_of_their_batches_and_count_repeats_once():
    held_out = HeldOut()
    for index, loss in (([0, 1, 2], 1.0), ([3], 5.0), ([3], 5.0)):
        held_out.add(torch.tensor(index), {"loss": torch.tensor(loss)}, {})
    losses, joined = held_out.join()
    assert losses == {"loss": 2.0} and joined == {}


def test_losses_that_are_not_finite_name_their_batches():
    held_out = HeldOut()
    for first, loss in ((0, 1.0), (4, float("nan")), (8, 2.0)):
        held_out.add(torch.arange(first, first + 4), {"loss": torch.tensor(loss)}, {})
    with pytest.raises(UserError, match=r"losses of 1 of 3 held-out batches .* rows \[4\]"):
        held_out.join()


def test_a_loss_that_only_some_batches_have():
    held_out = HeldOut()
    held_out.add(torch.tensor([0, 1]), {"a": torch.tensor(1.0)}, {})
    held_out.add(torch.tensor([2, 3]), {"a": torch.tensor(3.0), "b": torch.tensor(7.0)}, {})
    assert held_out.join()[0] == {"a": 2.0, "b": 7.0}


def test_data_without_a_trainer_gives_the_whole_split():
    data = Data("hammer", 4, 8, 21)
    whole = [batch[INDEX].tolist() for batch in data.evaluation_dataloader("val")]
    data.trainer = SimpleNamespace(global_rank=1, world_size=2, strategy=SimpleNamespace(root_device=torch.device("cpu")))
    assert [batch[INDEX].tolist() for batch in data.evaluation_dataloader("val")] == whole[1::2]
    data.trainer = None
    assert [batch[INDEX].tolist() for batch in data.evaluation_dataloader("val")] == whole
    assert sum(whole, []) == list(range(21))


def test_a_prediction_that_is_not_finite_is_named_with_its_row():
    bad = rows([7, 9])
    bad["score"][1] = float("inf")
    with pytest.raises(UserError, match=r"'score' is not finite for 1 of 2 samples; rows of the split: \[9\]"):
        join_rows([bad])


def test_a_weight_that_is_not_finite_is_named():
    module = nn.Linear(2, 2)
    check_weights(module)
    module.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="1 weights are not finite, the first is bias"):
        check_weights(module)
