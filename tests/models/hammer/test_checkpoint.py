import pytest
import torch

from models.hammer.checkpoint import load_official
from models.io import CheckpointError
from tests.golden.hammer import hammer_from_official, sizes_from_official
from tests.models.hammer.stand_in import SIZES, small_batch, small_hammer

HEADS = {"vision_heads": 2, "text_heads": 2, "grounding_heads": 2}


def official(model) -> dict:
    """As a file of the official code, including what it holds beside our tensors."""
    weights = {f"module.{name}": value.clone() for name, value in model.state_dict().items()}
    for tower in ("text_encoder", "text_encoder_m"):
        weights[f"module.{tower}.bert.embeddings.position_ids"] = torch.arange(12)[None]
    return weights


def test_sizes_and_weights_come_from_the_file():
    source = small_hammer()
    weights = official(source)
    assert {k: v for k, v in sizes_from_official(weights).items() if k in SIZES} == {
        k: v for k, v in SIZES.items() if not k.endswith("heads")
    }
    loaded = hammer_from_official(weights, dropout=0.0, **HEADS)
    for name, value in source.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_inference_file_without_towers_and_queues():
    source, target = small_hammer(), small_hammer(copy_momentum_classifier=False)
    with torch.no_grad():
        source.visual_encoder.pos_embed += 1
    weights = {k: v for k, v in official(source).items() if "_m." not in k and "queue" not in k}
    assert load_official(target, weights) == ["image_queue", "queue_ptr", "text_queue"]
    assert all(torch.equal(average, online) for average, online in target.momentum_pairs())


def albef(model) -> dict:
    new = ("classifier", "itm_head", "cls_head", "bbox_head", "cls_token_local", "norm_layer", "aggregator", "it_cross")
    weights = {k: v for k, v in official(model).items() if not any(part in k for part in new)}
    weights["itm_head.weight"], weights["itm_head.bias"] = torch.ones(2, 16), torch.ones(2)
    weights["text_encoder.cls.predictions.bias"] = weights["text_encoder_m.cls.predictions.bias"] = torch.ones(30)
    return weights


def test_albef_leaves_the_new_parts_alone():
    source, target = small_hammer(), small_hammer()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter += 1
        source.image_queue.mul_(-1)
        source.queue_ptr.fill_(8)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    missing = load_official(target, albef(source))
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name] if name in missing else source.state_dict()[name]), name
    assert "itm_head.0.weight" in missing and "text_encoder_m.classifier.0.weight" in missing
    assert target.queue_ptr.tolist() == [8]


def test_albef_of_other_image_and_queue_sizes():
    source, target = small_hammer(), small_hammer(image_size=24, queue_size=20)
    queue = target.image_queue.clone()
    load_official(target, albef(source))
    assert torch.equal(target.image_queue, queue)
    assert torch.equal(target.visual_encoder.pos_embed, target.visual_encoder_m.pos_embed)
    output = target(torch.zeros(4, 3, 24, 24), small_batch()["token_ids"], small_batch()["token_mask"])
    assert output.image.shape == (4, 10, 16)


def test_other_files_are_refused_with_their_difference():
    weights = official(small_hammer(text_layers=3))
    with pytest.raises(CheckpointError, match=r"layer\.2"):
        load_official(small_hammer(), weights)
    with pytest.raises(CheckpointError, match="embed"):
        sizes_from_official({"something": torch.ones(1)})
    wider = official(small_hammer(embed_dim=4))
    with pytest.raises(CheckpointError, match="vision_proj"):
        load_official(small_hammer(), wider)
    with pytest.raises(CheckpointError, match="modality=image"):
        load_official(small_hammer(modality="image"), official(small_hammer()))
