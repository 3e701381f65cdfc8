"""Official names, other sizes, heads on one side only, and what must be refused."""

import pytest
import torch

from models.all_in_one.checkpoint import load_backbone, load_official
from models.io import CheckpointError
from tests.golden.all_in_one import model_from_official
from tests.models.all_in_one.test_model import small


def test_round_trip_through_official_names():
    model = small(tasks=["match", "mlm", "answer", "contrastive"], num_answers=7)
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    again = model_from_official(weights, heads=2, drop_rate=0.0)
    assert set(again.tasks) == {"match", "mlm", "answer", "contrastive"}
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_temporal_rows_are_cut_padded_or_absent():
    weights = small(frames=3).state_dict()
    key = "transformer.temporal_embed"
    longer = model_from_official(weights, heads=2, frames=5).transformer.temporal_embed
    assert torch.equal(longer[:, :3], weights[key]) and not longer[:, 3:].any()
    assert torch.equal(model_from_official(weights, heads=2, frames=2).transformer.temporal_embed, weights[key][:, :2])
    del weights[key]
    assert not model_from_official(weights, heads=2).transformer.temporal_embed.any()


def test_text_positions_keep_the_overlap():
    weights = small().state_dict()
    model = small(text_length=20)
    before = model.text_embeddings.position_embeddings.weight[12:].clone()
    load_official(model, weights)
    table = model.text_embeddings.position_embeddings.weight
    assert torch.equal(table[:12], weights["text_embeddings.position_embeddings.weight"])
    assert torch.equal(table[12:], before)


def test_new_head_stays_fresh_and_ranking_starts_from_matching():
    pretrained = small(tasks=["match", "mlm"]).state_dict()
    model = small(tasks=["rank", "answer"], num_answers=5)
    loaded = load_official(model, pretrained)
    assert {name.split(".")[0] for name in loaded.fresh} == {"rank_output", "vqa_classifier"}
    assert all(name.startswith("mlm_score") for name in loaded.unused)
    assert torch.equal(model.rank_output.weight, pretrained["itm_score.fc.weight"][1:])
    official = small(tasks=["rank"])
    before = official.rank_output.weight.clone()
    load_official(official, pretrained, rank_from_match=False)
    assert torch.equal(official.rank_output.weight, before)


def test_co_training_names():
    weights = small(tasks=["match"]).state_dict()
    renamed = {name.replace("itm_score", "vtm_score").replace("transformer.", "student."): v for name, v in weights.items()}
    renamed["teacher.cls_token"] = torch.zeros(1)
    renamed["text_embeddings.position_ids"] = torch.arange(12)[None]
    model = model_from_official(renamed, heads=2)
    assert torch.equal(model.itm_score.fc.weight, weights["itm_score.fc.weight"])
    assert torch.equal(model.transformer.cls_token, weights["transformer.cls_token"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop("transformer.norm.weight"), "missing: transformer.norm.weight"),
        (lambda w: w.update({"encoder.weight": torch.ones(1)}), "unexpected: encoder.weight"),
        (lambda w: w.update({"pooler.dense.bias": torch.ones(3)}), "another shape: pooler.dense.bias"),
    ],
)
def test_wrong_checkpoints_are_refused(change, message):
    weights = dict(small().state_dict())
    change(weights)
    with pytest.raises(CheckpointError, match=message):
        load_official(small(), weights)


def test_backbone_of_timm():
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=64, num_classes=3)
    model = small(width=192, depth=12, heads=3, patch_size=16, image_size=48)
    text = model.text_embeddings.word_embeddings.weight.clone()
    load_backbone(model, vit.state_dict())
    model.eval()
    assert torch.equal(model.transformer.blocks[3].attn.qkv.weight, vit.blocks[3].attn.qkv.weight)
    assert torch.equal(model.text_embeddings.word_embeddings.weight, text)
    assert model.transformer.pos_embed.shape == (1, 10, 192)
    with pytest.raises(CheckpointError, match="do not fit"):
        load_backbone(small(), vit.state_dict())


def test_backbone_alone_is_the_vit():
    """Without text, roll, types and time, one frame through our blocks is timm's ViT."""
    import timm

    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, img_size=32, num_classes=0).eval()
    model = small(width=192, depth=12, heads=3, patch_size=16, image_size=32)
    load_backbone(model, vit.state_dict())
    with torch.no_grad():
        model.token_type_embeddings.weight.zero_()
        frame = torch.randn(2, 1, 3, 32, 32)
        ours = model.encode_video(model.embed(frame, still=True)).visual
        torch.testing.assert_close(ours, vit.forward_features(frame[:, 0]), rtol=1e-4, atol=1e-5)
