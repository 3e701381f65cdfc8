import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou_loss

from models.hammer.grounding import box_losses, paired_iou


def to_centres(corners):
    return box_convert(corners, "xyxy", "cxcywh")


def boxes(count=20):
    torch.manual_seed(0)
    low = torch.rand(2, count, 2) * 0.5
    return torch.cat([low, low + torch.rand(2, count, 2) * 0.5 + 0.01], dim=-1)


def test_overlaps_equal_torchvision():
    a, b = boxes()
    torch.testing.assert_close(paired_iou(a, b)[0], box_iou(a, b).diagonal())


def test_losses_equal_torchvision():
    a, b = boxes()
    l1, giou = box_losses(to_centres(a), to_centres(b))
    torch.testing.assert_close(l1, (to_centres(a) - to_centres(b)).abs().sum() / 20)
    torch.testing.assert_close(giou, generalized_box_iou_loss(a, b, reduction="mean"))


def test_rows_left_out_count_for_nothing():
    a, b = (to_centres(x) for x in boxes())
    keep = torch.arange(20) % 3 == 0
    for mine, theirs in zip(box_losses(a, b, keep), box_losses(a[keep], b[keep]), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_no_nan_comes_back_from_what_does_not_count():
    a, b = (to_centres(x) for x in boxes())
    a[0], b[0] = 0, 0  # 0 / 0
    a.requires_grad_()
    keep = torch.arange(20) > 0
    sum(box_losses(a, b, keep)).backward()
    assert a.grad.isfinite().all()
    crossed = a.detach().clone()
    crossed[1, 2] = -0.1
    crossed.requires_grad_()
    l1, giou = box_losses(crossed, b)
    (l1 + giou).backward()
    assert giou == 0 and crossed.grad.isfinite().all()
