import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model

from models.alignment.head import AlignmentHead
from models.alignment.projectors import LinearProjector
from models.io import CheckpointError
from models.sail.segmentation import (
    SegmentationEncoder,
    _windows,
    dinov2_from_weights,
    predict_classes,
    sliding_window_logits,
)


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4, layerscale_value=0.5
    )
    return Dinov2Model(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def head():
    torch.manual_seed(1)
    return AlignmentHead(16, 6, 5, LinearProjector).requires_grad_(False)


def test_plain_attention_is_dinov2(backbone):
    pixels = torch.randn(2, 3, 12, 20)
    tokens = backbone(pixels).last_hidden_state
    wanted = torch.cat([tokens[:, :1].expand(-1, 15, -1), tokens[:, 1:]], dim=-1)
    torch.testing.assert_close(SegmentationEncoder(backbone)(pixels), wanted)


def test_query_attention_is_plain_attention_with_the_queries_as_keys(backbone):
    weights = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    last = [name for name in weights if name.startswith("encoder.layer.1.attention") and name.endswith("weight")]
    query, key = (next(n for n in last if a in n or b in n) for a, b in (("q_proj", "query"), ("k_proj", "key")))
    for kind in ("weight", "bias"):
        weights[key.replace("weight", kind)] = weights[query.replace("weight", kind)]
    twin = Dinov2Model(backbone.config).eval()
    twin.load_state_dict(weights)
    pixels = torch.randn(1, 3, 12, 12)
    torch.testing.assert_close(SegmentationEncoder(backbone, "qq")(pixels), SegmentationEncoder(twin)(pixels))


def test_sizes_follow_from_the_weights(backbone):
    again = dinov2_from_weights(backbone.state_dict(), num_attention_heads=2)
    pixels = torch.randn(1, 3, 12, 16)
    torch.testing.assert_close(again(pixels).last_hidden_state, backbone(pixels).last_hidden_state)
    weights = {name: tensor for name, tensor in backbone.state_dict().items() if name != "layernorm.bias"}
    with pytest.raises(CheckpointError, match="layernorm.bias"):
        dinov2_from_weights(weights, num_attention_heads=2)


@pytest.mark.parametrize("length, crop, stride", [(28, 28, 14), (25, 28, 14), (29, 28, 14), (52, 28, 14), (90, 30, 7)])
def test_windows_cover_the_side_and_stay_inside(length, crop, stride):
    windows = _windows(length, crop, stride)
    assert windows[0][0] == 0 and windows[-1][1] == length
    assert all(0 <= start < end <= length and end - start == min(crop, length) for start, end in windows)
    assert all(later - earlier <= stride for (earlier, _), (later, _) in zip(windows, windows[1:], strict=False))


@pytest.mark.parametrize("height, width", [(9, 11), (12, 12), (17, 14)])
def test_sliding_window_by_hand(backbone, head, height, width):
    """Windows of 10 px are padded to 12, evenly; sums are divided by how often a pixel was seen."""
    encoder, pixels = SegmentationEncoder(backbone), torch.randn(1, 3, height, width)
    queries = F.normalize(torch.randn(4, 5), dim=-1)
    total, count = torch.zeros(1, 4, height, width), torch.zeros(height, width)
    for top, bottom in _windows(height, 10, 5):
        for left, right in _windows(width, 10, 5):
            h, w = bottom - top, right - left
            padded = torch.zeros(1, 3, 12, 12)
            y, x = (12 - h) // 2, (12 - w) // 2
            padded[:, :, y : y + h, x : x + w] = pixels[:, :, top:bottom, left:right]
            cosines = F.normalize(head.encode_image(encoder(padded)), dim=-1) @ queries.T
            maps = F.interpolate(cosines.permute(0, 2, 1).reshape(1, 4, 3, 3), size=12, mode="bilinear")
            total[:, :, top:bottom, left:right] += maps[:, :, y : y + h, x : x + w]
            count[top:bottom, left:right] += 1
    wanted = F.interpolate(total / count, size=(20, 21), mode="bilinear")
    got = sliding_window_logits(encoder, head, pixels, queries * 3, crop=10, stride=5, size=(20, 21))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_the_best_query_of_each_class_counts():
    scores = torch.tensor([1.0, 0.0, 3.0, 2.5]).reshape(1, 4, 1, 1)
    assert predict_classes(scores, torch.tensor([0, 0, 1, 1])).item() == 1
    assert predict_classes(scores, torch.tensor([2, 1, 0, 2])).item() == 0
    assert predict_classes(scores, torch.tensor([0, 1, 2, 3])).item() == 2
    assert predict_classes(scores, torch.tensor([0, 1, 2, 3]), threshold=0.9).item() == 0
