"""Official state dicts of MM-Lego's blocks and encoders: the sizes are read from the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from models.io import CheckpointError, load_strictly
from models.mm_lego.block import LegoBlock
from models.mm_lego.encoders import SNN, GatedAttentionPooling
from models.mm_lego.fuse import LegoFuse
from models.mm_lego.merge import Modular

STEP = ("modality_attention", "modality_feed_forward", "cross_attention", "feed_forward")
STEP_BEHIND_ENCODER = (None, "cross_attention", "feed_forward")
INNER = {
    "fn.to_q.": "to_q.",
    "fn.to_kv.": "to_kv.",
    "fn.to_out.0.": "to_out.",
    "fn.net.0.": "expand.",
    "fn.net.2.": "reduce.",
}
HEAD = {"to_logits.1.": "head.norm.", "to_logits.2.": "head.linear."}
SNN_NAMES = (r"fc_omic\.(\d+)\.0\.", r"layers.\1.")
POOLING_NAMES = {
    "attention_net.0.": "reduce.",
    "attention_net.3.attention_a.0.": "tanh.",
    "attention_net.3.attention_b.0.": "sigmoid.",
    "attention_net.3.attention_c.": "score.",
    "rho.0.": "output.",
}


def block_from_official(
    weights: Mapping[str, Tensor], encoder: nn.Module | None = None, dim_head: int = 64, **options: Any
) -> LegoBlock:
    """A block with the weights of an official one.

    Args:
        weights: state dict of an official LegoBlock. What its ``encoder`` holds is not read: load it into ``encoder``.
        encoder: our encoder with its weights, if the official block has one.
        dim_head: width of a head, which the weights do not tell.
        **options: of :class:`LegoBlock`. ``modality_attention`` is "unused" unless it is named.

    Raises CheckpointError where ``weights`` are not those of such a block.
    """
    try:
        step = ".".join(["layers.0", "2" if encoder is None else "1"])
        sizes: dict[str, Any] = {
            "width": weights[f"{step}.norm_context.weight"].shape[0],
            "heads": weights[f"{step}.fn.to_q.weight"].shape[0] // dim_head,
            "num_classes": weights["to_logits.2.weight"].shape[0],
        }
        latent = weights["latent"]
    except KeyError as error:
        kind = "without" if encoder is None else "with"
        raise CheckpointError(
            f"these are not the weights of an official LegoBlock {kind} encoder: {error} is missing."
        ) from error
    # Stacked blocks keep the last batch's latents instead of their own: nothing of the trained latent is left in the file.
    stacked = latent.ndim == 3
    depth = 1 + max(int(match[1]) for name in weights if (match := re.match(r"layers\.(\d+)\.", name)))
    options = {"modality_attention": "unused", **options}
    block = LegoBlock(
        **sizes,
        encoder=encoder,
        latent_tokens=latent.shape[-2],
        latent_dim=latent.shape[-1],
        depth=depth,
        dim_head=dim_head,
        **options,
    )
    state = block_state(weights, block)
    if stacked:
        del state["latent"]
    load_strictly(block, state, ("encoder.", *(("latent",) if stacked else ())), "the official LegoBlock")
    return block


def blocks_from_official(
    weights: Mapping[str, Tensor], encoders: Sequence[nn.Module | None] | None = None, dim_head: int = 64, **options: Any
) -> list[LegoBlock]:
    """The blocks of an official LegoMerge or LegoFuse. Build ours of them, then call :func:`load_shared`.

    Args:
        weights: state dict of the whole model.
        encoders: one for each block, None for a block without; None means that no block has one.
        dim_head, **options: see :func:`block_from_official`.
    """
    count = 1 + max((int(match[1]) for name in weights if (match := re.match(r"layers\.(\d+)\.latent$", name))), default=-1)
    return [
        block_from_official(_part(weights, f"layers.{i}."), encoder, dim_head, **options)
        for i, encoder in zip(range(count), encoders or [None] * count, strict=True)
    ]


def load_shared(model: Modular, weights: Mapping[str, Tensor]) -> None:
    """Load the merged head of an official LegoMerge or LegoFuse into ``model``, and the latent of weave if it has one."""
    head = {f"to_logits.{name}": value for name, value in _part(weights, "to_logits.combined_layers.").items()}
    load_strictly(model.head, {renamed(name, HEAD).removeprefix("head."): value for name, value in head.items()})
    if isinstance(model, LegoFuse) and model.latent is not None:
        with torch.no_grad():
            model.latent.copy_(weights["L"])


def _part(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def block_state(weights: Mapping[str, Tensor], block: LegoBlock) -> dict[str, Tensor]:
    """Official names to ours. Raises CheckpointError where steps that ``block`` shares differ in ``weights``."""
    parts = STEP if block.encoder is None else STEP_BEHIND_ENCODER
    state: dict[str, Tensor] = {}
    for name, value in weights.items():
        if match := re.fullmatch(r"layers\.(\d+)\.(\d)\.(.+)", name):
            part, rest = parts[int(match[2])], renamed(match[3], INNER)
            if part is None or (part == "modality_attention" and block.modality_attention == "none"):
                continue
            name = f"steps.{min(int(match[1]), len(block.steps) - 1)}.{part}.{rest}"
            if name in state and not torch.equal(state[name], value):
                raise CheckpointError(
                    f"the steps of these weights differ, so they are not share={block.share}: use share=none."
                )
        elif name.startswith("encoder."):
            continue
        state[renamed(name, HEAD)] = value
    return state


def snn_from_official(weights: Mapping[str, Tensor], **options: Any) -> SNN:
    """An encoder from the state dict of an official SNN; its classifier is left out. ``options`` are those of :class:`SNN`."""
    state = {re.sub(*SNN_NAMES, name): value for name, value in weights.items() if not name.startswith("classifier.")}
    matrices = [state[f"layers.{i}.weight"] for i in range(sum(name.endswith(".weight") for name in state))]
    encoder = SNN(matrices[0].shape[1], [len(matrix) for matrix in matrices], **options)
    load_strictly(encoder, state, source="the official SNN")
    return encoder


def pooling_from_official(weights: Mapping[str, Tensor], **options: Any) -> GatedAttentionPooling:
    """An encoder from the state dict of an official MILAttentionNet, without its classifier.

    ``options`` are those of :class:`GatedAttentionPooling`; the official one is ``softmax_over="batch"``.
    """
    state = {renamed(name, POOLING_NAMES): value for name, value in weights.items() if not name.startswith("classifier.")}
    hidden, width = state["reduce.weight"].shape
    encoder = GatedAttentionPooling(width, hidden, len(state["tanh.weight"]), len(state["output.weight"]), **options)
    load_strictly(encoder, state, source="the official MILAttentionNet")
    return encoder


def renamed(name: str, names: Mapping[str, str]) -> str:
    """``name`` with its beginning replaced."""
    for old, new in names.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name
