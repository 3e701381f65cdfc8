import pytest
import torch
from transformers import Dinov2Config, Dinov2Model

from models.alignment.head import AlignmentHead
from models.alignment.projectors import LinearProjector
from models.sail.segmentation import (
    SegmentationEncoder,
    predict_classes,
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


def test_the_best_query_of_each_class_counts():
    scores = torch.tensor([1.0, 0.0, 3.0, 2.5]).reshape(1, 4, 1, 1)
    assert predict_classes(scores, torch.tensor([0, 0, 1, 1])).item() == 1
    assert predict_classes(scores, torch.tensor([2, 1, 0, 2])).item() == 0
    assert predict_classes(scores, torch.tensor([0, 1, 2, 3])).item() == 2
    assert predict_classes(scores, torch.tensor([0, 1, 2, 3]), threshold=0.9).item() == 0
