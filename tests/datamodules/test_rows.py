"""Bad rows are skipped, replaced or reported by one rule; draws depend on seed, epoch and row alone."""

import numpy as np
import pytest
import torch

from datamodules.base import BaseDataModule
from datamodules.order import BatchRequest
from datamodules.readers.base import BadSample
from datamodules.rows import TRIES, RowDataset
from models.batch import INDEX, SKIPPED
from models.errors import UserError


class Numbers(RowDataset):
    def __init__(self, count, bad=(), training=False):
        self.count, self.bad, self.training = count, set(bad), training

    def __len__(self):
        return self.count

    def key(self, row):
        return f"row{row}"

    def read(self, row, rng):
        if row in self.bad:
            raise BadSample(f"odd: row {row}")
        return rng.random()

    def collate(self, rows, samples, request):
        return {"x": torch.tensor(samples)}


def request(*rows, epoch=0, seed=0):
    return BatchRequest(np.array(rows), epoch, seed)


def test_training_replaces_bad_rows_and_evaluation_leaves_them_out():
    batch = Numbers(10, {1, 2, 9}, training=True)[request(1, 3, 9)]
    assert batch[INDEX].tolist() == [4, 3, 0] and len(batch["x"]) == 3
    assert [(s.index, s.key, s.reason) for s in batch[SKIPPED]][:2] == [(1, "row1", "odd: row 1"), (2, "row2", "odd: row 2")]
    batch = Numbers(10, {1, 2, 9})[request(1, 3, 9)]
    assert batch[INDEX].tolist() == [3] and len(batch[SKIPPED]) == 2


def test_an_empty_batch_of_evaluation_gets_the_next_row():
    assert Numbers(10, {1, 2})[request(1)][INDEX].tolist() == [3]
    assert Numbers(10, {1, 2}).batch(request(1))[INDEX].tolist() == []  # where rows must be these and no others


@pytest.mark.parametrize("count, training", [(5, True), (5, False), (500, True)])
def test_nothing_can_be_read(count, training):
    batch = Numbers(count, range(count), training)[request(0, 1)]
    assert set(batch) == {INDEX, SKIPPED} and len(batch[INDEX]) == 0
    assert len(batch[SKIPPED]) == min(count, TRIES + 2)
    data = BaseDataModule(max_skipped=1.0)
    data.splits = {"train": Numbers(1000)}
    data.trainer = type("T", (), {"state": type("S", (), {"stage": type("V", (), {"value": "train"})})})
    with pytest.raises(UserError, match="(?s)not one sample.*row0: odd: row 0"):
        data.on_before_batch_transfer(batch, 0)


def test_every_row_of_a_large_bad_batch_is_tried():
    batch = Numbers(1000, range(300))[request(*range(400))]
    assert batch[INDEX].tolist() == list(range(300, 400)) and len(batch[SKIPPED]) == 300


def test_draws_depend_on_seed_epoch_and_row():
    data = Numbers(10, training=True)
    x = data[request(3, 5)]["x"]
    assert torch.equal(data[request(5)]["x"], x[1:])
    assert not torch.equal(data[request(3, 5, epoch=1)]["x"], x) and not torch.equal(data[request(3, 5, seed=1)]["x"], x)
    evaluation = Numbers(10)
    assert torch.equal(evaluation[request(3)]["x"], evaluation[request(3, epoch=4)]["x"])


def test_names_that_cannot_be_printed_are_cleaned():
    data = BaseDataModule()
    data.splits = {"train": Numbers(100)}
    batch = Numbers(2, {0})[request(0, 1)]
    data.report_skipped("train", [batch[SKIPPED][0]._replace(key="\udc80 x", reason="odd: \ud83d")])
    str(data.skip_report()).encode()
