"""Two real processes over gloo against one process with the whole batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from experiments.benchmarks.reference import contrastive as reference
from models.losses.barlow import BarlowTwinsLoss
from models.losses.contrastive import InfoNCELoss, SigmoidLoss
from models.losses.gather import GradientScope, gather_texts

RANKS, SIZE, DIM = 2, 5, 4
KINDS = {
    "barlow": (
        lambda scope: BarlowTwinsLoss(scope=scope),
        lambda image, texts, _scale, _bias: reference.barlow_twins(image, texts[0], 0.0051),
    ),
    "sigmoid": (lambda scope: SigmoidLoss(scope=scope), reference.sigmoid_loss),
    "sigmoid_batch": (
        lambda scope: SigmoidLoss("batch", scope),
        lambda *args: reference.sigmoid_loss(*args, reduction="batch"),
    ),
    "info_nce": (
        lambda scope: InfoNCELoss(scope),
        lambda image, texts, scale, _bias: reference.info_nce(image, texts[0], scale),
    ),
}


def _inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(RANKS * SIZE, DIM, generator=generator, dtype=torch.float64) for _ in range(3)]
    return [*features, torch.tensor([6.0], dtype=torch.float64), torch.tensor([-2.0], dtype=torch.float64)]


def _rank(rank: int, store: str, queue) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for kind, (make, _) in KINDS.items():
        for scope in ("rank", "all") if kind == "barlow" else ("rank", "own", "all"):
            image, text, extra, scale, bias = _inputs()
            mine = [x[rank * SIZE : (rank + 1) * SIZE] for x in (image, text, extra)]
            leaves = [x.clone().requires_grad_() for x in (*mine, scale, bias)]
            loss = make(scope)(leaves[0], leaves[1:3], *leaves[3:]).losses["contrastive"]
            loss.backward()
            grads = [None if leaf.grad is None else leaf.grad.numpy() for leaf in leaves]
            queue.put((kind, scope, rank, loss.item(), grads))
            # In evaluation ranks may come with unlike batches: nothing must be exchanged.
            alone = make("rank")(*[leaves[0], leaves[1:3], *leaves[3:]]).losses["contrastive"]
            assert make(scope).eval()(leaves[0], leaves[1:3], *leaves[3:]).losses["contrastive"] == alone
    dist.barrier()  # a rank that leaves while another still exchanges aborts it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    store = tmp_path_factory.mktemp("gloo") / "store"
    mp.spawn(_rank, (str(store), queue), nprocs=RANKS)  # joins, and raises what a rank raised
    results = {}
    while not queue.empty():
        kind, scope, rank, *rest = queue.get()
        results[kind, scope, rank] = rest
    return results


@pytest.mark.parametrize("kind", KINDS)
def test_all_is_the_loss_of_one_process_with_the_whole_batch(found, kind):
    leaves = [x.requires_grad_() for x in _inputs()]
    dense = KINDS[kind][1](leaves[0], leaves[1:3], *leaves[3:])
    dense.backward()
    values, grads = zip(*(found[kind, "all", rank] for rank in range(RANKS)), strict=True)
    assert sum(values) / RANKS == pytest.approx(dense.item())
    for position, leaf in enumerate(leaves):
        if leaf.grad is None:
            continue
        parts = [torch.from_numpy(grads[rank][position]) for rank in range(RANKS)]
        # DDP averages what follows from each rank's gradients.
        whole = torch.cat(parts) / RANKS if len(leaf) > 1 else sum(parts) / RANKS
        torch.testing.assert_close(whole, leaf.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_rank_is_the_loss_of_each_part(found, kind):
    for rank in range(RANKS):
        part = [x[rank * SIZE : (rank + 1) * SIZE].requires_grad_() if len(x) > 1 else x for x in _inputs()]
        dense = KINDS[kind][1](part[0], part[1:3], *part[3:])
        value, grads = found[kind, "rank", rank]
        assert value == pytest.approx(dense.item())
        for got, leaf in zip(grads[:2], part[:2], strict=True):
            torch.testing.assert_close(torch.from_numpy(got), torch.autograd.grad(dense, leaf, retain_graph=True)[0])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "barlow"])
def test_own_keeps_the_gradients_of_a_ranks_rows_to_its_embeddings(found, kind):
    """One process, where everything but the rank's rows of the matrix, and others' texts in them, is constant."""
    for rank in range(RANKS):
        own = torch.arange(RANKS * SIZE) // SIZE == rank
        image, text, extra, scale, bias = _inputs()
        image, text = image.requires_grad_(), text.requires_grad_()
        mixed = torch.where(own[:, None], text, text.detach())
        logits = []
        for texts in (mixed, extra):
            rows = scale * F.normalize(image, dim=-1) @ F.normalize(texts, dim=-1).T + bias
            logits.append(torch.where(own[:, None], rows, rows.detach()))
        if kind == "info_nce":
            labels = torch.arange(len(image))
            loss = (F.cross_entropy(logits[0], labels) + F.cross_entropy(logits[0].T, labels)) / 2
        else:
            terms = [F.logsigmoid((2 * torch.eye(len(image)) - 1) * matrix) for matrix in logits]
            loss = -torch.cat(terms, dim=1).mean() * (len(image) if kind == "sigmoid_batch" else 1)
        _, grads = found[kind, "own", rank]
        for got, leaf in zip(grads[:2], (image, text), strict=True):
            wanted = torch.autograd.grad(loss, leaf, retain_graph=True)[0][own]
            torch.testing.assert_close(torch.from_numpy(got) / RANKS, wanted)


def test_without_a_process_group_nothing_is_gathered():
    text = torch.randn(3, 2)
    assert gather_texts(text, GradientScope.ALL) == (text, 0)
