"""Weights of LLaVA-OV-Manager: the released layout in both directions, and where training starts."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

from lightning_modules.llava_manager import LlavaManagerModule
from models.errors import UserError
from models.io import CheckpointError, hub_files, read_tensors
from models.two_tower.llava import managed_llava
from models.two_tower.llava_checkpoint import load_official, onevision, siglip_and_qwen2, to_official
from tests.models.two_tower.test_llava import SIZES, inputs, small

WIDTH, VISION, LAYERS, VISION_LAYERS = 16, 12, 4, 3


def released(kind: str = "static") -> dict[str, torch.Tensor]:
    """Names and shapes of the released files at the smallest size: output weights are those of the input."""
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: 0.3 * torch.randn(*shape, generator=generator)  # noqa: E731
    weights = {"model.embed_tokens.weight": draw(40, WIDTH), "model.norm.weight": draw(WIDTH)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", 16), ("k", 8), ("v", 8)):
            weights[f"{prefix}.self_attn.{name}_proj.weight"] = draw(rows, WIDTH)
            weights[f"{prefix}.self_attn.{name}_proj.bias"] = draw(rows)
        weights[f"{prefix}.self_attn.o_proj.weight"] = draw(WIDTH, WIDTH)
        for name, shape in (("gate", (32, WIDTH)), ("up", (32, WIDTH)), ("down", (WIDTH, 32))):
            weights[f"{prefix}.mlp.{name}_proj.weight"] = draw(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{name}.weight"] = draw(WIDTH)
    for name, shape in (("0", (WIDTH, VISION)), ("2", (WIDTH, WIDTH))):
        weights[f"model.mm_projector.{name}.weight"], weights[f"model.mm_projector.{name}.bias"] = draw(*shape), draw(WIDTH)
    tower = "model.vision_tower.vision_tower.vision_model"
    weights |= {
        "model.image_newline": draw(WIDTH),
        f"{tower}.embeddings.patch_embedding.weight": draw(VISION, 3, 4, 4),
        f"{tower}.embeddings.patch_embedding.bias": draw(VISION),
        f"{tower}.embeddings.position_embedding.weight": draw(4, VISION),
        f"{tower}.post_layernorm.weight": draw(VISION),
        f"{tower}.post_layernorm.bias": draw(VISION),
    }
    for layer in range(VISION_LAYERS):
        prefix = f"{tower}.encoder.layers.{layer}"
        shapes = {f"self_attn.{name}_proj": (VISION, VISION) for name in ("q", "k", "v", "out")}
        for name, shape in {**shapes, "mlp.fc1": (24, VISION), "mlp.fc2": (VISION, 24)}.items():
            weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"] = draw(*shape), draw(shape[0])
        for name in ("layer_norm1", "layer_norm2"):
            weights[f"{prefix}.{name}.weight"], weights[f"{prefix}.{name}.bias"] = draw(VISION), draw(VISION)
    weights |= {"model.manager.0.layer_scores": draw(1, 1, 1, WIDTH), "model.manager_layer_embedding": draw(2, WIDTH)}
    if kind == "static":
        return weights | {"model.manager.1.layer_scores": draw(1, 2, 1, WIDTH)}
    cross = {
        f"model.manager.1.fusion_attention.{name}_proj.{part}": draw(*shape)
        for name in ("q", "k")
        for part, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))
    }
    gate = {"model.manager.1.zero_gate": draw(1, 2, 1, WIDTH)}
    inputs = 1 if kind == "adaptive" else 2
    controller = {"model.manager.1.linear_controller.weight": draw(2, inputs * WIDTH)}
    return weights | gate | controller | (cross if kind == "adaptive_cross" else {})


@pytest.mark.parametrize("kind", ["static", "adaptive_last", "adaptive_cross"])
def test_released_weights_are_read_and_written(kind):
    weights, model = released(kind), small(kind)
    load_official(model, weights)
    torch.testing.assert_close(to_official(model), weights)
    assert model.llava.lm_head.weight is model.llava.get_input_embeddings().weight
    load_official(model, {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})  # some files hold it
    with pytest.raises(CheckpointError, match="kind=" + ("static" if kind == "static" else kind)):
        load_official(small("adaptive"), weights)
    with pytest.raises(CheckpointError, match="missing"):
        load_official(model, {name: value for name, value in weights.items() if "mm_projector.2" not in name})


def test_a_baseline_has_no_managers():
    weights = {name: value for name, value in released().items() if "manager" not in name}
    with pytest.raises(CheckpointError, match="module.managers=false"):
        load_official(small(), weights)
    bare = small(managed=False)
    load_official(bare, weights)
    torch.testing.assert_close(to_official(bare), weights)


def test_a_folder_of_shards_is_a_checkpoint(tmp_path):
    weights = released()
    names = sorted(weights)
    for number, part in enumerate((names[:20], names[20:]), 1):
        save_file({name: weights[name] for name in part}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_qwen_manager"}))
    files = hub_files(tmp_path)
    module = LlavaManagerModule(partial(managed_llava, **SIZES), grids=[[2, 1], [1, 2], [2, 2]])
    module.load_official({name: value for file in files for name, value in read_tensors(file).items()})
    torch.testing.assert_close(to_official(module.model), weights)
    assert len(files) == 2 and module.loaded


def test_training_starts_from_siglip_and_qwen2(tmp_path):
    """One layer of SigLIP is left out, and its head; the projector and the managers stay as they are."""
    torch.manual_seed(3)
    vision = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=VISION, intermediate_size=24, num_hidden_layers=VISION_LAYERS + 1, num_attention_heads=2, image_size=8,
            patch_size=4,
        )
    ).eval()  # fmt: skip
    language = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=40, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    vision.save_pretrained(tmp_path / "siglip")
    language.save_pretrained(tmp_path / "qwen")
    model = small(drawn=False)
    projector = model.llava.model.multi_modal_projector.linear_1.weight.clone()
    siglip_and_qwen2(model, str(tmp_path / "siglip"), str(tmp_path / "qwen"))
    pixels, ids = torch.randn(1, 3, 8, 8), inputs()["ids"][2:]
    ours = model.llava.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(ours, vision(pixels, output_hidden_states=True).hidden_states[-2])  # LLaVA's select layer -2
    text = model(ids, torch.ones_like(ids), [pixels[:0]], [(0, 0)], [(0, 0)])
    torch.testing.assert_close(model.logits(text), language(ids).logits)
    assert torch.equal(projector, model.llava.model.multi_modal_projector.linear_1.weight)

    model.llava.save_pretrained(tmp_path / "onevision")
    again = small()
    onevision(again, str(tmp_path / "onevision"))
    torch.testing.assert_close(again.llava.state_dict(), model.llava.state_dict())
    with pytest.raises(UserError, match="module.weights.vision"):
        siglip_and_qwen2(model, str(tmp_path / "none"), str(tmp_path / "qwen"))
    with pytest.raises(UserError, match="holds no whole"):  # nothing begins at random without a word
        siglip_and_qwen2(model, str(tmp_path / "qwen"), str(tmp_path / "qwen"))
    with pytest.raises(CheckpointError, match="another shape"):
        siglip_and_qwen2(small(), str(tmp_path / "siglip"), str(_narrow(tmp_path)))


def _narrow(folder):
    config = Qwen2Config(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=40,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder / "narrow")
    return folder / "narrow"
