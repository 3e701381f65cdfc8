"""What is added to batches of features: the right partners and shares, fixed within an epoch, and the same on a resume."""

import numpy as np
import pytest
import torch

from datamodules.features.batch_extras import FixedStructure, FuseMix, Unpaired
from datamodules.order import BatchRequest, OrderedBatches, epoch_order
from models.alignment.batch import IMAGE_FEATURES, STRUCTURE_IMAGE, STRUCTURE_TEXT, TEXT_FEATURES, TEXT_TOKENS
from models.batch import INDEX
from models.errors import UserError

SAMPLES, BATCH = 20, 6


class Pairs(torch.utils.data.Dataset):
    """The image feature of row r is 2^r, exactly, and its text feature minus that: a mixture betrays its parts."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, request):
        rows = torch.from_numpy(np.sort(request.rows))
        value = 2.0 ** rows[:, None].double()
        return {INDEX: rows, IMAGE_FEATURES: value.expand(-1, 3), TEXT_FEATURES: -value.expand(-1, 2)}


def epoch(dataset, number=0, ranks=1):
    """The batches of an epoch, those of all ranks after one another."""
    samplers = [
        OrderedBatches(SAMPLES, BATCH // ranks, seed=3, rank=r, world_size=ranks, position=lambda: (number, 0))
        for r in range(ranks)
    ]
    return [[dataset[request] for request in sampler] for sampler in samplers]


def test_partners_stand_half_a_batch_earlier_and_share_one_coefficient():
    order = epoch_order(SAMPLES, 3, 0).tolist()
    shares = []
    for number, batch in enumerate(epoch(FuseMix(Pairs(), BATCH, 0.7))[0]):
        assert sorted(batch[INDEX].tolist()) == sorted(order[number * BATCH : (number + 1) * BATCH])
        assert torch.equal(batch[TEXT_FEATURES][:, 0], -batch[IMAGE_FEATURES][:, 0])
        partners = [order[(order.index(r) - BATCH // 2) % SAMPLES] for r in batch[INDEX].tolist()]
        own, other = (2.0 ** torch.tensor(rows).double() for rows in (batch[INDEX].tolist(), partners))
        share = ((batch[IMAGE_FEATURES][:, 0] - other) / (own - other)).tolist()
        assert share == pytest.approx([share[0]] * BATCH, abs=1e-4) and 0 < share[0] < 1
        shares.append(share[0])
    assert len(set(shares)) == 3


def test_ranks_mix_as_one_process_would():
    alone = epoch(FuseMix(Pairs(), BATCH, 0.7), 2)[0]
    for whole, *parts in zip(alone, *epoch(FuseMix(Pairs(), BATCH, 0.7), 2, ranks=2), strict=True):
        index = torch.cat([part[INDEX] for part in parts])
        mixed = torch.cat([part[IMAGE_FEATURES] for part in parts])[index.argsort()]
        torch.testing.assert_close(mixed, whole[IMAGE_FEATURES])


def test_shares_follow_the_beta_distribution():
    dataset = FuseMix(Pairs(), SAMPLES, 0.2)
    shares = []
    for number in range(400):
        batch = dataset[BatchRequest(np.arange(SAMPLES), number, 0)]
        order = epoch_order(SAMPLES, 0, number)
        partner = order[(int(np.flatnonzero(order == 19)[0]) - SAMPLES // 2) % SAMPLES]
        shares.append((float(batch[IMAGE_FEATURES][19, 0]) - 2.0**partner) / (2.0**19 - 2.0**partner))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * 0.2 + 1)), rel=0.15)


def test_fixed_structure_is_that_of_the_first_batch_for_a_whole_epoch():
    def fixed(number):
        return [batch[STRUCTURE_IMAGE][:, 0].log2().long().tolist() for batch in epoch(dataset, number)[0]]

    dataset = FixedStructure(Pairs(), BATCH, 4)
    (rows, *others), later = fixed(0), fixed(1)
    assert others == [rows] * 2 and later[0] != rows
    assert set(rows) < set(epoch_order(SAMPLES, 3, 0)[:BATCH].tolist()) and len(rows) == 4
    batch = epoch(dataset)[0][1]
    assert torch.equal(batch[STRUCTURE_TEXT][:, 0], -batch[STRUCTURE_IMAGE][:, 0]) and len(batch[INDEX]) == BATCH


def test_unpaired_samples_stand_beside_every_batch():
    images = torch.ones(5, 3)
    batches = epoch(Unpaired(Pairs(), images=images))[0]
    assert all(torch.equal(batch[STRUCTURE_IMAGE], images) and STRUCTURE_TEXT not in batch for batch in batches)


def test_what_cannot_be_done_is_refused():
    class Tokens(Pairs):
        def __getitem__(self, request):
            return super().__getitem__(request) | {TEXT_TOKENS: torch.zeros(len(request.rows), 4, 2)}

    with pytest.raises(UserError, match="text_tokens"):
        FuseMix(Tokens(), BATCH, 1.0)[BatchRequest(np.arange(BATCH), 0, 0)]
    with pytest.raises(UserError, match="must be positive"):
        FuseMix(Pairs(), BATCH, -1.0)
    with pytest.raises(UserError, match="between 2 and the batch's 6"):
        FixedStructure(Pairs(), BATCH, 7)
