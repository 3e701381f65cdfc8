"""Official files of ARL and METER, and the knowledge that the latter lack."""

import pytest
import torch

from models.arl.checkpoint import load_official, model_from_official, official_names
from models.arl.parameter_groups import arl_groups
from models.io import CheckpointError
from models.two_tower.checkpoint import load_towers
from models.two_tower.checkpoint import official_names as meter_names
from models.two_tower.connectors import NoConnector
from models.two_tower.model import TwoTower
from tests.models.arl.stand_in import small_arl, small_inputs

LAST = "transformer.resblocks.1.attn.in_proj_weight"
HEADS = {"heads": 2, "image_heads": 2, "text_heads": 2, "knowledge_heads": 2, "mim_heads": 2}


def test_a_file_of_ours_under_official_names_comes_back():
    model = small_arl()
    named = official_names(model)
    assert {"align_head.conv1.lin_src.weight", "align_head.conv1.lin_dst.weight", "mim_head.decoder_pos_embed"} <= named.keys()
    extra = {"vision_encoder.token_embedding.weight": torch.zeros(3), "language_encoder.pooler.dense.bias": torch.zeros(2)}
    again = model_from_official({**named, **extra, "train_mlm_loss.scalar": torch.zeros(1)}, **HEADS)
    assert set(again.tasks) == set(model.tasks)
    torch.testing.assert_close(again.state_dict(), model.state_dict())
    torch.testing.assert_close(again.eval()(*small_inputs()).pooled, model(*small_inputs()).pooled)
    newer = {name.replace(".lin_src.", ".lin."): value for name, value in named.items() if ".lin_dst." not in name}
    torch.testing.assert_close(model_from_official(newer, **HEADS).state_dict(), model.state_dict())


def test_other_sizes_of_image_and_no_masked_image_head():
    named = official_names(small_arl())
    larger = small_arl(image_size=24, tasks=("answer", "rank", "match"))
    fresh = load_official(larger, named).fresh
    assert larger.vit_model.visual.positional_embedding.shape == (37, 16) and fresh == []


def test_the_ranking_head_starts_from_the_matching_head():
    model = small_arl(tasks=("match", "rank"))
    named = {name: value for name, value in official_names(small_arl()).items() if not name.startswith("irtr_head")}
    assert load_official(model, named).fresh == []
    torch.testing.assert_close(model.rank_output.weight[0], named["itm_head.fc.weight"][1])


def test_meter_leaves_the_knowledge_as_it_is():
    sizes = {
        "image_size": 16, "patch_size": 4, "image_width": 16, "image_layers": 2, "image_heads": 2, "text_width": 12,
        "text_layers": 2, "text_heads": 2, "text_intermediate": 24, "vocab_size": 30, "max_positions": 16, "width": 16,
        "levels": 3, "heads": 2, "mlp_ratio": 2.0,
    }  # fmt: skip
    torch.manual_seed(5)
    meter = TwoTower(NoConnector, **sizes)
    model = small_arl()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fresh = load_official(model, meter_names(meter)).fresh
    state = model.state_dict()
    torch.testing.assert_close(state["mlm_score.decoder.weight"], meter.mlm_score.decoder.weight.detach())
    for name in ("align_head.x", "cross_modal_text_layers.1.knowledge2text.weight", "mim_head.mask_token"):
        assert name in fresh
        torch.testing.assert_close(state[name], before[name])
    with pytest.raises(CheckpointError, match="not ARL's"):
        model_from_official(meter_names(meter))


def test_half_of_the_knowledge_is_refused():
    named = official_names(small_arl())
    del named["multi_modal_language_layers.0.knowledge2text.weight"]
    with pytest.raises(CheckpointError, match="knowledge2text"):
        load_official(small_arl(), named)


def test_clips_last_block_is_left_out():
    clip = {f"visual.{name}": value for name, value in small_arl(image_layers=3).vit_model.visual.state_dict().items()}
    model = small_arl()
    load_towers(model, None, clip)
    assert f"visual.{LAST}".replace(".1.", ".2.") in clip
    torch.testing.assert_close(model.vit_model.visual.state_dict()[LAST], clip[f"visual.{LAST}"])


def test_groups_differ_between_pretraining_and_afterwards():
    model = small_arl()
    for pretrain, scale in ((True, 7.0), (False, 1.0)):
        groups = arl_groups(model.named_parameters(), 7.0, 3.0, pretrain)
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        assert scales[id(model.align_head.x)] == scale and scales[id(model.cls_classifier[0].weight)] == 7.0
        assert scales[id(model.cross_modal_text_layers[0].knowledge2text.weight)] == 3.0
