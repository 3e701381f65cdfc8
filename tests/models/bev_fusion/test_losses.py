import torch
from torch.nn import functional as F

from models.bev_fusion.losses import OccupancyLoss, class_loss, coarse_target, dice_loss, occupancy_loss


def label():
    out = torch.zeros(1, 4, 4, dtype=torch.long)
    out[0, 0, 0], out[0, 0, 1], out[0, 1, :2] = 2, 255, 255
    out[0, 2:, 2:] = 255
    return out


def test_a_block_is_known_by_any_of_its_cells():
    target, valid = coarse_target(label())
    assert target.tolist() == [[[1, 0], [0, 0]]]
    assert valid.tolist() == [[[1, 1], [1, 0]]]


def test_coarse_loss_by_hand():
    logit = torch.tensor([[[[0.5, -1.0], [2.0, 9.0]]]])
    target, valid = coarse_target(label())
    terms = -3 * F.logsigmoid(torch.tensor(0.5)) - F.logsigmoid(torch.tensor(1.0)) - F.logsigmoid(torch.tensor(-2.0))
    torch.testing.assert_close(occupancy_loss(logit, target, valid), terms / 3)


def test_class_loss_is_torchs_weighted_mean():
    torch.manual_seed(0)
    logits, weight = torch.randn(1, 3, 4, 4), torch.tensor([1.0, 5.0, 2.0])
    wanted = F.cross_entropy(logits, label(), weight, ignore_index=255)
    torch.testing.assert_close(class_loss(logits, label(), weight), wanted)


def test_dice_is_near_zero_for_the_right_answer_and_sees_no_unknown_cells():
    truth = label()
    sure = 50 * F.one_hot(truth.masked_fill(truth == 255, 1), 3).movedim(-1, 1).float()
    assert dice_loss(sure, truth) < 1e-6
    assert dice_loss(-sure, truth) > 0.3


def test_maps_without_labels_give_zero_not_nan():
    unknown = torch.full((1, 4, 4), 255)
    terms = OccupancyLoss()(torch.randn(1, 1, 2, 2), torch.randn(1, 2, 4, 4), unknown)
    assert terms["occupancy"] == 0 and terms["class"] == 0
    assert torch.isfinite(terms["dice"])
