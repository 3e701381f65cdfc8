"""Weights of LLaVA-OV-Manager: where training starts, and the released checkpoints in both directions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration, Qwen2ForCausalLM, SiglipVisionModel

from models.encoders.weights import WeightsUnavailable, find_weights
from models.io import CheckpointError, load_strictly
from models.two_tower.llava import ManagedLlava

SIGLIP, QWEN = "google/siglip-so400m-patch14-384", "Qwen/Qwen2-0.5B-Instruct"
ONEVISION = "llava-hf/llava-onevision-qwen2-0.5b-ov-hf"
# Beginnings of names: of the official code, and of ours below ``llava``.
OFFICIAL = (
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.image_newline", "model.image_newline"),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
    ("lm_head.", "lm_head."),
)
TIED = "lm_head.weight"


def siglip_and_qwen2(model: ManagedLlava, vision: str | None = None, language: str | None = None) -> None:
    """Where stage 1 starts: a SigLIP without its last layers and its head, and a Qwen2; the projector stays as it is.

    Args:
        model: of their sizes; as many layers of SigLIP are used as it has.
        vision: folder of SigLIP; null: the hub's cache, or the hub.
        language: folder of Qwen2, likewise.

    Raises:
        UserError: there are no such weights, or they are of other sizes.
    """
    tower, decoder = model.llava.model.vision_tower, model.llava.model.language_model
    siglip = _loaded(SiglipVisionModel, "SigLIP", SIGLIP, vision, "module.weights.vision")
    used = model.llava.config.vision_config.num_hidden_layers
    weights = {name.removeprefix("vision_model."): value for name, value in siglip.state_dict().items()}
    layer = re.compile(r"encoder\.layers\.(\d+)\.")
    read = {
        name: value
        for name, value in weights.items()
        if not name.startswith("head.") and not ((place := layer.match(name)) and int(place[1]) >= used)
    }
    load_strictly(getattr(tower, "vision_model", tower), read, source=vision or SIGLIP)
    qwen = _loaded(Qwen2ForCausalLM, "Qwen2", QWEN, language, "module.weights.language")
    load_strictly(decoder, qwen.model.state_dict(), source=language or QWEN)
    load_strictly(model.llava.lm_head, qwen.lm_head.state_dict(), source=language or QWEN)


def onevision(model: ManagedLlava, folder: str | None = None) -> None:
    """Start from a whole LLaVA-OneVision of transformers, to which the managers are new.

    Args:
        model: of its sizes.
        folder: of the weights; null: the hub's cache, or the hub.

    Raises:
        UserError: there are no such weights, or they are of other sizes.
    """
    theirs = _loaded(LlavaOnevisionForConditionalGeneration, "LLaVA-OneVision", ONEVISION, folder, "module.weights.folder")
    load_strictly(model.llava, theirs.state_dict(), source=folder or ONEVISION)


def _loaded(family: Any, name: str, repo_id: str, folder: str | None, option: str) -> Any:
    path = find_weights(name, repo_id, folder, option)
    try:
        model, facts = family.from_pretrained(str(path), local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:  # what transformers raises for a folder of something else
        raise WeightsUnavailable(f"{option}: {path} holds no {name} ({str(error)[:200]}).") from error
    if missing := sorted(facts["missing_keys"]):  # which transformers has filled at random
        raise WeightsUnavailable(f"{option}: {path} holds no whole {name}, it lacks {', '.join(missing[:3])}.")
    return model


def load_official(model: ManagedLlava, weights: Mapping[str, Tensor]) -> None:
    """The weights of a released checkpoint. Raises CheckpointError where they are of other sizes or managers."""
    # transformers has named the inner part of SigLIP and left it nameless.
    inner = "vision_model." if hasattr(model.llava.model.vision_tower, "vision_model") else ""
    renamed = {_our_name(name, inner): value for name, value in weights.items()}
    if model.managers is None:
        renamed = {name: value for name, value in renamed.items() if not name.startswith("managers.")}
    elif not any(name.startswith("managers.") for name in renamed):
        raise CheckpointError("this checkpoint has no managers. Leave them out: module.managers=false.")
    elif (found := _kinds(renamed)) and model.managers.kind not in found:
        kinds = " or ".join(found)
        raise CheckpointError(f"its managers are {kinds}, not {model.managers.kind}: set module.model.kind={found[0]}.")
    if model.llava.config.tie_word_embeddings:  # files may hold the output weights or not
        renamed["llava.lm_head.weight"] = renamed.get(
            "llava.lm_head.weight", renamed.get("llava.model.language_model.embed_tokens.weight")
        )
    load_strictly(model, renamed)


def to_official(model: ManagedLlava) -> dict[str, Tensor]:
    """The weights under the names of the official code, for its ``from_pretrained``."""
    official = {_theirs(name): value for name, value in model.state_dict().items()}
    if model.llava.config.tie_word_embeddings:
        del official[TIED]
    return official


def _our_name(name: str, inner: str) -> str:
    if name.startswith("model.manager"):
        return f"managers.{name.removeprefix('model.')}"
    for theirs, ours in OFFICIAL:
        if name.startswith(theirs):
            return f"llava.{ours}{inner if 'vision_tower' in ours else ''}{name.removeprefix(theirs)}"
    return name


def _theirs(name: str) -> str:
    if name.startswith("managers."):
        return f"model.{name.removeprefix('managers.')}"
    for theirs, ours in OFFICIAL:
        if name.startswith(f"llava.{ours}"):
            rest = name.removeprefix(f"llava.{ours}").removeprefix("vision_model.")
            return f"{theirs}{rest}"
    raise KeyError(name)


def _kinds(weights: Mapping[str, Tensor]) -> list[str]:
    """The kinds of managers that have such weights."""
    controllers = [value for name, value in weights.items() if name.endswith("linear_controller.weight")]
    if not controllers:
        return ["static"]
    if any("fusion_attention" in name for name in weights):
        return ["adaptive_cross"]
    gates = next(value for name, value in weights.items() if name.endswith("zero_gate"))
    return ["adaptive"] if controllers[0].shape[1] == gates.shape[-1] else ["adaptive_last", "adaptive_average"]
