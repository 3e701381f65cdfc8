"""TransE: true triples are closer than false ones, draws follow the relation, and equal seeds give equal vectors."""

import torch

from models.arl.transe import _codes, corrupt, distance, head_share, train_transe

# Two groups of four entities around a head each; relation 0 has many tails for a head, relation 1 many heads for a tail.
TAILS = (1, 2, 3, 4)
TRIPLES = torch.tensor([*([0, tail, 0] for tail in TAILS), *([head, 0, 1] for head in TAILS), [5, 6, 0], [6, 5, 1]])


def test_training_brings_related_entities_together():
    options = {"width": 8, "epochs": 60, "batches": 2, "negatives": 5, "margin": 1.0, "lr": 0.5}
    first, second = (train_transe(TRIPLES, 7, 2, **options) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (7, 8)
    unit = torch.nn.functional.normalize(first, dim=-1)
    near = (unit[1:5][:, None] - unit[1:5]).abs().sum(-1).sum() / 12  # tails of one head
    assert near < 0.7 * (unit[1:5] - unit[6]).abs().sum(-1).mean()


def test_distance_is_of_unit_vectors():
    vectors, moves = torch.tensor([[2.0, 0.0], [0.0, 3.0]]), torch.tensor([[5.0, 0.0]])
    assert distance(vectors, moves, torch.tensor([[0, 1, 0]])).item() == 3  # (1, 0) + (1, 0) - (0, 1)


def test_false_triples_are_false_and_replace_the_rarer_side():
    share = head_share(TRIPLES, 2)
    assert share[0] > 0.5 > share[1]  # of relation 0 the head is replaced more often
    true = _codes(TRIPLES, 7).unique()
    many = TRIPLES[:4].repeat(200, 1)
    false = corrupt(many, 7, share, true, torch.Generator().manual_seed(0))
    # Of tails, 4 of 7 are true, and 10 draws are tried: 0.4 % of those that replace the tail stay true.
    assert torch.isin(_codes(false, 7), true).float().mean() < 0.01
    changed = (false != many).float().mean(dim=0)
    assert changed[0] > changed[1] and changed[2] == 0


def test_no_triples_give_initial_vectors():
    assert train_transe(TRIPLES[:0], 3, 0, width=4).shape == (3, 4)
