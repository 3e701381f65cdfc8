"""DINOv2 backbones in the layouts of its repository, timm and transformers, and training checkpoints of the repository."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from models.encoders.preprocess import ImagePreprocess
from models.io import CheckpointError, atomic_directory, load_strictly
from models.rad_dino.backbone import EPS, DinoViT
from models.rad_dino.model import StudentAndTeacher

# Ours, which are the repository's, and those of transformers' files; parts of the MLP and of LayerScale inside a block.
TRANSFORMERS = {
    "cls_token": "embeddings.cls_token",
    "mask_token": "embeddings.mask_token",
    "pos_embed": "embeddings.position_embeddings",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}
IN_BLOCK = {
    "attn.proj": "attention.output.dense",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "mlp.w12": "mlp.weights_in",
    "mlp.w3": "mlp.weights_out",
}
NEWER_NAMES = {  # of modules of transformers 5, whose files keep the older ones
    r"attention\.q_proj": "attention.attention.query",
    r"attention\.k_proj": "attention.attention.key",
    r"attention\.v_proj": "attention.attention.value",
    r"attention\.o_proj": "attention.output.dense",
    r"mlp\.down_proj": "mlp.weights_out",
}
PROJECTIONS = ("query", "key", "value")
JOINED = {  # one tensor of ours -> those that stand for it, in order
    "attn.qkv": tuple(f"attention.attention.{part}" for part in PROJECTIONS),
    "mlp.w12": ("mlp.gate_proj", "mlp.up_proj"),
}
MASK_TOKEN = "mask_token"  # absent from timm's files


def backbone_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A backbone in any of the three layouts by the names of :class:`DinoViT`.

    Prefixes of wrappers, the teacher of a training checkpoint, blocks in chunks, and timm's names for registers and SwiGLU are
    understood. Raises CheckpointError for anything that is no DINOv2 backbone.
    """
    named = _without_wrappers(weights)
    if any(name.startswith("embeddings.") for name in named):
        named = _from_transformers(named)
    named = {flat_name(name): value for name, value in named.items() if not name.startswith("head.")}
    if "patch_embed.proj.weight" not in named or "cls_token" not in named:
        raise CheckpointError(f"these are not the weights of a DINOv2 backbone; first names: {sorted(weights)[:5]}.")
    return _from_timm(named)


def sizes(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of :class:`DinoViT` that weights by its names show. The heads are 64 wide in every released model."""
    dim, _, patch, _ = weights["patch_embed.proj.weight"].shape
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    swiglu = "blocks.0.mlp.w12.weight" in weights
    hidden = weights["blocks.0.mlp.w12.weight" if swiglu else "blocks.0.mlp.fc1.weight"].shape[0]
    registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
    return {
        "image_size": round((weights["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        "patch_size": patch,
        "dim": dim,
        "depth": depth,
        "heads": max(dim // 64, 1),
        "mlp_ratio": 4.0 if swiglu else hidden / dim,
        "ffn": "swiglu" if swiglu else "mlp",
        "registers": registers,
        **({"position_offset": 0.0, "position_antialias": True} if registers else {}),
    }


def load_backbone(model: DinoViT, weights: dict[str, Tensor]) -> None:
    """Load a backbone in any layout; positions of another image size are resized to the model's. Raises CheckpointError."""
    named = backbone_weights(weights)
    if named["pos_embed"].shape != model.pos_embed.shape:
        source = DinoViT(**{**sizes(named), "depth": 0})
        source.pos_embed.data = named["pos_embed"]
        named["pos_embed"] = source.positions(model.image_size, model.image_size).detach()
    load_strictly(model, named, optional=(MASK_TOKEN,))


def load_official(model: StudentAndTeacher, weights: dict[str, Tensor]) -> None:
    """Load what a DINOv2 training or release left: the student and teacher with their centres, the teacher alone (backbone and
    heads), or a backbone alone. What a file lacks stays as it is; the teacher then starts as the student's copy.

    Raises CheckpointError where a part does not fit.
    """
    named = {name.removeprefix("module."): value for name, value in weights.items()}
    students = {name: value for name, value in named.items() if name.startswith("student.")}
    if students:
        whole = {flat_name(name): value for name, value in named.items()}
        load_strictly(model, whole, optional=("dino_loss.", "ibot_patch_loss."))
        return
    load_backbone(model.student["backbone"], named)  # type: ignore[arg-type]
    for part in ("dino_head", "ibot_head"):
        head = {name.partition(f"{part}.")[2]: value for name, value in named.items() if f"{part}." in name}
        if head and part in model.student:
            load_strictly(model.student[part], head)
    model.copy_student()


def to_transformers(model: DinoViT) -> dict[str, Tensor]:
    """The weights by the names of transformers' Dinov2 files."""
    out = {}
    for name, value in model.state_dict().items():
        if not name.startswith("blocks."):
            out[_renamed(name, TRANSFORMERS)] = value
            continue
        _, index, inner = name.split(".", 2)
        prefix = f"encoder.layer.{index}."
        if inner.startswith("attn.qkv."):
            for part, piece in zip(PROJECTIONS, value.chunk(3), strict=True):
                out[f"{prefix}attention.attention.{part}.{inner.rpartition('.')[2]}"] = piece
        else:
            out[prefix + _renamed(inner, IN_BLOCK)] = value
    return {name: value.detach().contiguous().clone() for name, value in out.items()}


def export_transformers(model: DinoViT, folder: Path, preprocess: ImagePreprocess) -> Path:
    """Write a folder that transformers loads as ``Dinov2Model``, and ``encoder.vision.weights`` names.

    Args:
        model: the encoder.
        folder: new.
        preprocess: how images were seen in training, written as ``preprocessor_config.json``.
    """
    mean, std = list(preprocess.mean), list(preprocess.std)
    config = {
        "architectures": ["Dinov2WithRegistersModel" if model.registers else "Dinov2Model"],
        "model_type": "dinov2_with_registers" if model.registers else "dinov2",
        "hidden_size": model.dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.heads,
        "mlp_ratio": round(model.mlp_ratio) if model.mlp_ratio == round(model.mlp_ratio) else model.mlp_ratio,
        "image_size": model.image_size,
        "patch_size": model.patch_size,
        "num_channels": 3,
        "hidden_act": "gelu",
        "layer_norm_eps": EPS,
        "layerscale_value": 1.0,
        "qkv_bias": True,
        "use_swiglu_ffn": model.ffn == "swiglu",
        "torch_dtype": "float32",
        **({"num_register_tokens": model.registers} if model.registers else {}),
    }
    processor = {
        "image_processor_type": "BitImageProcessor",
        "crop_size": {"height": preprocess.size[0], "width": preprocess.size[1]},
        "size": {"shortest_edge": preprocess.shortest},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": mean,
        "image_std": std,
        "resample": 3,
        "rescale_factor": 1 / 255,
    }
    with atomic_directory(folder) as scratch:
        save_file(to_transformers(model), scratch / "model.safetensors", metadata={"format": "pt"})
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (scratch / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    return folder


def _without_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefixes of wrappers; of a training checkpoint the teacher's backbone alone."""
    named = {name.removeprefix("module.").removeprefix("dinov2."): value for name, value in weights.items()}
    for prefix in ("teacher.backbone.", "backbone."):
        if inside := {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}:
            return inside
    return named


def flat_name(name: str) -> str:
    """``blocks.<chunk>.<index>.…`` to ``blocks.<index>.…``."""
    return re.sub(r"blocks\.\d+\.(\d+)\.", r"blocks.\1.", name)


def _from_transformers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    outside, inside = ({theirs: ours for ours, theirs in names.items()} for names in (TRANSFORMERS, IN_BLOCK))
    out: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Tensor]] = {}
    owner = {part: ours for ours, parts in JOINED.items() for part in parts}
    for name, value in weights.items():
        for newer, older in NEWER_NAMES.items():
            name = re.sub(newer, older, name)
        if not (match := re.fullmatch(r"encoder\.layer\.(\d+)\.(.*)", name)):
            out[_renamed(name, outside)] = value
        elif (part := match[2].rpartition(".")[0]) in owner:
            pieces.setdefault(f"blocks.{match[1]}.{owner[part]}.{match[2].rpartition('.')[2]}", {})[part] = value
        else:
            out[f"blocks.{match[1]}.{_renamed(match[2], inside)}"] = value
    for name, tensors in pieces.items():
        parts = JOINED[name.split(".", 2)[2].rpartition(".")[0]]
        if tensors.keys() != set(parts):
            raise CheckpointError(f"{name} needs {', '.join(parts)}; the file has {sorted(tensors)}.")
        out[name] = torch.cat([tensors[part] for part in parts])
    return out


def _from_timm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm says ``reg_token``, adds the class token's position to the token, and calls SwiGLU's layers fc1 and fc2."""
    out = dict(weights)
    if "reg_token" in out:
        out["register_tokens"] = out.pop("reg_token")
    side = round((out["pos_embed"].shape[1]) ** 0.5)
    if side**2 == out["pos_embed"].shape[1]:
        out["pos_embed"] = torch.cat([torch.zeros_like(out["pos_embed"][:, :1]), out["pos_embed"]], dim=1)
    if "blocks.0.mlp.fc1.weight" in out and len(out["blocks.0.mlp.fc1.weight"]) != out["blocks.0.mlp.fc2.weight"].shape[1]:
        out = {name.replace("mlp.fc1.", "mlp.w12.").replace("mlp.fc2.", "mlp.w3."): value for name, value in out.items()}
    return out


def _renamed(name: str, names: dict[str, str]) -> str:
    """``name`` with the longest beginning that ``names`` knows replaced; others stay."""
    for old, new in names.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name
