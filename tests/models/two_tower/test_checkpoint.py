"""Weights go both ways: official files and transformers' port, with equal outputs."""

import pytest
import torch
from transformers import (
    BridgeTowerConfig,
    BridgeTowerForContrastiveLearning,
    BridgeTowerForMaskedLM,
    BridgeTowerModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from models.errors import UserError
from models.io import CheckpointError
from models.two_tower.checkpoint import clip_names, load_official, load_towers, model_from_official, official_names
from models.two_tower.port import model_from_port, port_contrast, to_port
from tests.models.two_tower.stand_in import CONNECTORS, SIZES, small_images, small_model, small_texts

HEADS = {"heads": 2, "image_heads": 2, "text_heads": 2, "dropout": 0.0}
OFFICIAL = [name for name in CONNECTORS if name not in ("static_manager_all",)]


@pytest.mark.parametrize("connector", OFFICIAL)
def test_official_names_build_the_same_model(connector):
    model, (ids, mask), images = small_model(connector), small_texts(), small_images()
    weights = {f"module.{name}": value for name, value in official_names(model).items()}
    weights["module.text_transformer.pooler.dense.weight"] = torch.zeros(1)
    masking = {} if not connector.startswith("adaptive") else {"mask_padding": connector != "adaptive_manager_official"}
    again = model_from_official(weights, masking, **HEADS).eval()
    assert {type(again.connector), set(again.tasks) == set(model.tasks)} == {type(model.connector), True}
    torch.testing.assert_close(again(ids, mask, images), model(ids, mask, images))


def test_loading_resizes_positions_and_keeps_heads_that_a_file_lacks():
    source = small_model("bridge", tasks=("mlm", "match"))
    model = small_model("bridge", tasks=("match", "answer", "reason"), image_size=32, image_types=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fresh, unused = load_official(model, official_names(source))
    assert {name.split(".")[0] for name in fresh} == {"vqa_classifier", "nlvr2_classifier"}
    assert {name.split(".")[0] for name in unused} == {"mlm_score"}
    assert model.vit_model.visual.positional_embedding.shape == (17, 12)
    torch.testing.assert_close(model.token_type_embeddings.weight[2], source.token_type_embeddings.weight[1])
    torch.testing.assert_close(model.vqa_classifier[0].weight, before["vqa_classifier.0.weight"])
    with pytest.raises(CheckpointError, match="missing"):
        load_official(model, {"itm_score.fc.weight": torch.zeros(2, 32)})


def test_another_answer_vocabulary_keeps_its_new_classifier():
    model = small_model("none", tasks=("answer",), answers=9)
    fresh, _ = load_official(model, official_names(small_model("none", tasks=("answer",))))
    assert {name.split(".")[0] for name in fresh} == {"vqa_classifier"}


def test_towers_start_from_roberta_and_clip():
    source, model = small_model("none"), small_model("none", image_size=32)
    torch.nn.init.zeros_(model.vit_model.visual.conv1.weight)
    text = {f"roberta.{name}": value for name, value in source.text_transformer.state_dict().items()}
    image = {f"visual.{name}": value.half() for name, value in source.vit_model.visual.state_dict().items()}
    load_towers(
        model, text | {"lm_head.bias": torch.zeros(1)}, image | {"visual.proj": torch.zeros(1), "logit_scale": torch.ones(())}
    )
    torch.testing.assert_close(model.vit_model.visual.conv1.weight, source.vit_model.visual.conv1.weight, atol=1e-3, rtol=1e-2)
    with pytest.raises(CheckpointError, match="RoBERTa"):
        load_towers(model, {"embeddings.word_embeddings.weight": torch.zeros(1)}, None)


def test_names_of_hugging_faces_clip():
    sizes = {"hidden_size": 12, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 2}
    clip = randomised(CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=16, patch_size=8, hidden_act="quick_gelu")))
    weights = clip.state_dict()
    if not any(name.startswith("vision_model.") for name in weights):
        weights = {f"vision_model.{name}": value for name, value in weights.items()}
    model = small_model("none")
    load_towers(model, None, clip_names(weights | {"text_model.final_layer_norm.bias": torch.zeros(1)}))
    (ours,) = model.vit_model.visual(small_images(), range(3, 4))
    out = clip(pixel_values=small_images(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(ours, model.vit_model.visual.ln_post(out), rtol=1e-4, atol=1e-5)


def port_config(**changes) -> BridgeTowerConfig:
    eps, text, width = changes.pop("eps", 1e-5), changes.pop("text_eps", 1e-5), changes.pop("width", 32)
    return BridgeTowerConfig(
        hidden_size=width, num_attention_heads=2, num_hidden_layers=3, layer_norm_eps=eps, **changes,
        text_config={
            "hidden_size": width, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 40,
            "max_position_embeddings": 14, "layer_norm_eps": text, "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        vision_config={"hidden_size": 64, "num_hidden_layers": 4, "patch_size": 8, "image_size": 16, "layer_norm_eps": 1e-6},
    )  # fmt: skip


def randomised(port):
    torch.manual_seed(1)
    for parameter in port.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return port.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"link_tower_type": "scaled_add"},
        {"link_tower_type": "interpolate", "text_eps": 1e-6},
        {"share_cross_modal_transformer_layers": False, "eps": 1e-4},
    ],
)
def test_port_and_model_are_equal_in_both_directions(changes):
    (ids, mask), images = small_texts(), small_images()
    config = port_config(**changes)
    port = randomised(BridgeTowerModel(config))
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": images}
    model = model_from_port(port.state_dict(), config).eval()
    expected, ours = port(**inputs), model(ids, mask, images)
    for name in ("text_features", "image_features", "pooler_output"):
        actual = {"text_features": ours.text, "image_features": ours.image, "pooler_output": ours.pooled}[name]
        torch.testing.assert_close(actual, expected[name], rtol=1e-5, atol=1e-5)
    back_config, weights = to_port(model)
    again = BridgeTowerModel(back_config)
    report = again.load_state_dict({k.removeprefix("bridgetower."): v for k, v in weights.items()}, strict=False)
    assert not report.unexpected_keys and all(
        "text_model.pooler" in key or "position_ids" in key for key in report.missing_keys
    )
    torch.testing.assert_close(again.eval()(**inputs).pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)


def test_heads_of_the_port():
    (ids, mask), images = small_texts(), small_images()
    config = port_config(width=64)  # the contrastive class needs the width of the vision model
    config.contrastive_hidden_size, config.logit_scale_init_value = 8, 1.2
    port = randomised(BridgeTowerForContrastiveLearning(config))
    expected = port(input_ids=ids, attention_mask=mask, pixel_values=images, return_loss=True)
    model = model_from_port(port.state_dict(), config).eval()
    ours = port_contrast(model, ids, mask, images)
    for name in ("text", "image", "cross"):
        torch.testing.assert_close(getattr(ours, name), expected[f"{name}_embeds"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=1e-5, atol=1e-5)
    assert {"itc_text_head.fc.weight", "logit_scale"} <= to_port(model)[1].keys()
    language = randomised(BridgeTowerForMaskedLM(config))
    model = model_from_port(language.state_dict(), config).eval()
    expected = language(input_ids=ids, attention_mask=mask, pixel_values=images).logits
    torch.testing.assert_close(model.mlm_score(model(ids, mask, images).text), expected, rtol=1e-5, atol=1e-4)


def test_what_the_port_cannot_hold_is_refused():
    with pytest.raises(UserError, match="bridges alone"):
        to_port(small_model("none"))
    with pytest.raises(UserError, match="64 channels"):
        to_port(small_model("bridge"))
    sizes = {"image_width": 64, "image_heads": 1, "text_intermediate": 32}
    with pytest.raises(UserError, match="one LayerNorm eps"):
        to_port(small_model("bridge", **sizes))
    small = small_model("bridge", cross_eps=1e-5, **sizes)
    assert to_port(small)[0].text_config.vocab_size == SIZES["vocab_size"]
