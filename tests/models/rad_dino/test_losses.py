"""Objectives of DINOv2 against their plain forms; masks; what the model promises beyond the golden files."""

import random

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from models.rad_dino.backbone import DinoViT
from models.rad_dino.head import DinoHead
from models.rad_dino.losses import CentredTargets, prototype_loss, sinkhorn_knopp
from models.rad_dino.masking import BlockMasks, batch_masks, described, official_most_cells
from models.rad_dino.model import StudentAndTeacher
from models.rad_dino.schedules import cosine, dino_cosine
from models.sizes import PROTOTYPES


def plain_sinkhorn(logits, temperature):
    q = (logits.double() / temperature).exp().T
    q /= q.sum()
    for _ in range(3):
        q = q / q.sum(dim=1, keepdim=True) / q.shape[0]
        q = q / q.sum(dim=0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T


def test_sinkhorn_equals_the_plain_form_and_does_not_overflow():
    logits = torch.randn(12, 30)
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.1).double(), plain_sinkhorn(logits, 0.1), rtol=1e-4, atol=1e-6)
    large = sinkhorn_knopp(logits + 1000, 0.1)
    torch.testing.assert_close(large, sinkhorn_knopp(logits, 0.1), rtol=1e-2, atol=1e-4)
    assert torch.isfinite(sinkhorn_knopp(logits * 1000, 0.1)).all()
    assert sinkhorn_knopp(torch.zeros(0, 30), 0.1).shape == (0, 30)


def test_sinkhorn_overwrites_where_it_may():
    logits = torch.randn(12, 30)
    before = logits.clone()
    expected = sinkhorn_knopp(logits, 0.1)
    assert torch.equal(logits, before)
    assert torch.equal(sinkhorn_knopp(logits, 0.1, overwrite=True), expected) and torch.equal(logits, expected)


def _sinkhorn_of_rank(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    logits = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    torch.save(sinkhorn_knopp(logits.tensor_split((5, 12))[rank], 0.1), f"{results}/{rank}.pt")
    dist.barrier()  # a rank that leaves while another still exchanges aborts it
    dist.destroy_process_group()


@pytest.mark.ddp
def test_sinkhorn_balances_over_ranks(tmp_path):
    """Three processes, with 5, 7 and no rows."""
    mp.spawn(_sinkhorn_of_rank, (str(tmp_path / "store"), str(tmp_path)), nprocs=3)
    joined = torch.cat([torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(3)])
    logits = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(joined, sinkhorn_knopp(logits, 0.1))


@pytest.mark.parametrize("entries", [30, 2**22], ids=["row by row", "at once"])
def test_prototype_loss_equals_the_plain_form_with_its_gradients(entries, monkeypatch):
    monkeypatch.setattr("models.rad_dino.losses.PROTOTYPES", PROTOTYPES._replace(cpu=entries))
    unit, weight = torch.randn(7, 5, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    targets, row_weights = torch.rand(7, 30), torch.rand(7)
    tensors = [(unit.clone().requires_grad_(), weight.clone().requires_grad_()) for _ in range(2)]
    log_softmax = (tensors[0][0] @ tensors[0][1].T / 0.1).log_softmax(dim=1)
    plain = -(row_weights[:, None] * targets * log_softmax).sum()
    ours = prototype_loss(tensors[1][0], tensors[1][1], targets, row_weights)
    (3 * plain).backward()
    (3 * ours).backward()
    torch.testing.assert_close(ours.double(), plain, rtol=1e-4, atol=1e-4)
    for expected, actual in zip(*tensors, strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-3, atol=1e-3)


def test_rows_may_share_targets(monkeypatch):
    monkeypatch.setattr("models.rad_dino.losses.PROTOTYPES", PROTOTYPES._replace(cpu=60))  # tiles of two rows
    unit, weight, targets, target_of = (
        torch.randn(6, 5),
        torch.randn(30, 5),
        torch.rand(3, 30),
        torch.tensor([0, 1, 2, 0, 1, 2]),
    )
    shared = prototype_loss(unit, weight, targets, torch.ones(6), target_of=target_of)
    torch.testing.assert_close(shared, prototype_loss(unit, weight, targets[target_of], torch.ones(6)))


def test_prototype_loss_without_rows():
    unit, weight = torch.randn(0, 5, requires_grad=True), torch.randn(30, 5, requires_grad=True)
    prototype_loss(unit, weight, torch.zeros(0, 30), torch.zeros(0)).backward()
    assert not weight.grad.any()


def test_centre_of_a_step_without_masked_patches_stays():
    centring = CentredTargets((1, 1, 5))
    centring.center.fill_(2.0)
    centring(torch.zeros(0, 5), 0.1)
    assert torch.equal(centring.center, torch.full((1, 1, 5), 2.0))


def test_masks_stay_within_their_counts():
    most = official_most_cells(518, 14)
    assert most == 666
    batch = batch_masks(8, BlockMasks((37, 37), most), random.Random(0))
    counts = batch.crops.sum(dim=1)
    assert int((counts > 0).sum()) == 4 and len(batch.indices) == int(counts.sum()) <= batch.upper_bound
    torch.testing.assert_close(batch.weights.sum(), torch.tensor(4.0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    encoder = {"image_size": 32, "patch_size": 8, "dim": 24, "depth": 2, "heads": 2}
    return StudentAndTeacher(lambda: DinoViT(**encoder, drop_path=0.3), lambda width: DinoHead(width, 20, 16, 8))


def test_stochastic_depth_in_the_student_alone(model):
    images = torch.randn(6, 3, 32, 32)
    student, teacher = model.train().student["backbone"], model.teacher["backbone"]
    for network in (student, teacher):
        for block in network.blocks:
            torch.nn.init.ones_(block.ls1.gamma)
    assert torch.equal(teacher(images).cls, teacher(images).cls)
    assert not torch.equal(student(images).cls, student(images).cls)


def test_without_local_crops_the_denominator_is_three(model):
    model.eval()
    crops, masks = torch.randn(4, 3, 32, 32), described(torch.zeros(4, 16, dtype=torch.bool))
    arguments = (masks.crops, masks.indices, masks.weights, 0.07)
    alone = model.losses(crops, None, *arguments)
    with_locals = model.losses(crops, torch.randn(2, 3, 16, 16), *arguments)
    assert "dino_local" not in alone and alone["ibot"].item() == 0
    torch.testing.assert_close(alone["dino_global"] * 3, with_locals["dino_global"] * 4)


def test_clipping_is_per_part(model):
    for scale, part in zip((10.0, 1e-3), model.student.values(), strict=True):
        for parameter in part.parameters():
            parameter.grad = torch.full_like(parameter, scale)
    head_before = [p.grad.clone() for p in model.student["dino_head"].parameters()]
    model.clip_gradients(3.0)
    norm = torch.stack([p.grad.norm() for p in model.student["backbone"].parameters()]).norm()
    torch.testing.assert_close(norm, torch.tensor(3.0), rtol=1e-4, atol=0)
    assert all(torch.equal(a, p.grad) for a, p in zip(head_before, model.student["dino_head"].parameters(), strict=True))


def test_schedule_meets_its_peak_twice_and_stays_at_the_end():
    rates = [cosine(step, 2.0, 0.5, 100, 10) for step in range(120)]
    assert rates[0] == 0 and rates[9] == rates[10] == 2.0 and rates[100:] == [0.5] * 20
    assert dino_cosine(100, 10, 2.0, 0.5, 1)(9) == 1.0
