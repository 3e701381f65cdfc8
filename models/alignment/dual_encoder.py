"""Two frozen encoders and a trained head as one CLIP-like model: raw images and texts in, embeddings of one space out.

On disk it is a directory::

    config.json         the head's and the encoders' classes and arguments, the encoders' identities, the chosen layers
    head.safetensors    the trained head, under its own names or those of its official code
    vision/, text/      the encoders' own files; left out, the encoders are found as they were in training
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from models.alignment.head import AlignmentHead, embed_image_features, embed_text_features
from models.encoders.base import FrozenEncoder
from models.encoders.text import HFTextEncoder
from models.encoders.vision import HFVisionEncoder, TimmVisionEncoder
from models.errors import UserError
from models.freeze_align.head import TokenAlignmentHead
from models.io import CheckpointError, load_strictly, read_tensors
from models.sail.checkpoint import head_from_official
from models.sail.sharelock import ShareLockHead

CONFIG, HEAD, FORMAT = "config.json", "head.safetensors", "dual-encoder-2"
SAIL_FORMAT = "dual-encoder-1"  # of earlier exports: always a head of SAIL under its official names
# What a configuration may ask for: reading a directory from elsewhere must not call anything else.
HEADS = ("models.alignment.", "models.freeze_align.", "models.sail.", "models.structure.")
ENCODERS = {cls.__name__: cls for cls in (TimmVisionEncoder, HFVisionEncoder, HFTextEncoder)}


class Tokens(dict):
    """A text encoder's inputs by name, (B, L) each; moves like a tensor."""

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens({name: tensor.to(device) for name, tensor in self.items()})


class DualEncoder(nn.Module):
    """``encode_image``, ``encode_text``, ``tokenizer`` and ``preprocess`` as OpenCLIP and CLIP_benchmark use them.

    Args:
        vision: frozen image encoder; its pooled features have the width that the head takes.
        text: frozen text encoder, likewise.
        head: the trained projectors.
        layers: the layer of each encoder that the head takes, where it is not the pooled output.
    """

    def __init__(
        self,
        vision: FrozenEncoder,
        text: FrozenEncoder,
        head: AlignmentHead | TokenAlignmentHead | ShareLockHead,
        layers: tuple[int | None, int | None] | None = None,
    ):
        super().__init__()
        self.vision, self.text, self.head = vision, text, head
        self.vision_layer, self.text_layer = layers or (None, None)
        self.preprocess = vision.preprocess

    @property
    def device(self) -> torch.device:
        return next(self.head.parameters()).device

    @property
    def logit_scale(self) -> Tensor:
        """The log of the scale, (1,), as CLIP has it."""
        return self.head.scale().log().reshape(1) if hasattr(self.head, "scale") else self.head.logit_scale

    def tokenizer(self, texts: str | Sequence[str]) -> Tokens:
        """B texts to the inputs of ``encode_text``, padded to the longest."""
        return Tokens(self.text.tokenize([texts] if isinstance(texts, str) else list(texts)))

    def encode_image(self, pixel_values: Tensor, normalize: bool = False) -> Tensor:
        """Preprocessed images (B, 3, H, W) to embeddings (B, D)."""
        out = embed_image_features(self.head, self.vision(pixel_values), self.vision_layer).vector
        return F.normalize(out, dim=-1) if normalize else out

    def encode_text(self, tokens: dict[str, Tensor], normalize: bool = False) -> Tensor:
        """The output of ``tokenizer`` to embeddings (B, D)."""
        out = embed_text_features(self.head, self.text(dict(tokens)), self.text_layer).vector
        return F.normalize(out, dim=-1) if normalize else out

    @torch.inference_mode()
    def embed_images(
        self,
        images: Iterable[Image.Image],
        batch_size: int = 64,
        preprocess: Callable[[Image.Image], Tensor] | None = None,
    ) -> Tensor:
        """Images to embeddings (N, D) on the CPU; an iterable is read batch by batch. ``preprocess``: other than its own."""
        parts, batch = [], []
        for image in images:
            batch.append((preprocess or self.preprocess)(image))
            if len(batch) == batch_size:
                parts.append(self.encode_image(torch.stack(batch).to(self.device)).cpu())
                batch = []
        if batch:
            parts.append(self.encode_image(torch.stack(batch).to(self.device)).cpu())
        return torch.cat(parts)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Texts to embeddings (N, D) on the CPU."""
        starts = range(0, len(texts), batch_size)
        return torch.cat([self.encode_text(self.tokenizer(texts[s : s + batch_size]).to(self.device)).cpu() for s in starts])


def save_dual_encoder(
    folder: Path,
    model: DualEncoder,
    arguments: Mapping[str, Mapping[str, Any]],
    official: str | None = None,
    copy_encoders: bool = True,
) -> None:
    """Write what :func:`load_dual_encoder` reads into an existing folder.

    Args:
        arguments: of 'vision' and 'text', what their constructors were called with, and of 'head' the same with the class's
            dotted name as ``_target_``; classes within it likewise, with ``_partial_`` where they are factories.
        official: write the head's weights under the names of this module of official names ('models.sail.checkpoint',
            'models.freeze_align.checkpoint', 'models.structure.checkpoint'); None: under its own names.
        copy_encoders: put the encoders' files beside the head. False keeps the directory small; loading then needs the same
            weights to be found again by name or path.

    Raises:
        UserError: an encoder or a part of the head that is none of ours, or weights that do not fit the head's arguments.
        CheckpointError: a projector without official counterpart.
    """
    weights = model.head.state_dict() if official is None else _official_names(official).to_official(model.head)
    weights = {key: value.contiguous().cpu() for key, value in weights.items()}
    save_file(weights, folder / HEAD)
    layers = [model.vision_layer, model.text_layer]
    config: dict[str, Any] = {"format": FORMAT, "head": arguments["head"], "official": official, "layers": layers}
    try:
        _load_head(config, weights)
    except CheckpointError as error:
        raise CheckpointError(
            f"the head is not of its configuration; from an official file, write official names. {error}"
        ) from None
    for name, encoder in (("vision", model.vision), ("text", model.text)):
        if type(encoder).__name__ not in ENCODERS:
            raise UserError(
                f"an encoder of the class {type(encoder).__name__} cannot be exported; known: {', '.join(ENCODERS)}."
            )
        encoder_arguments = dict(arguments[name])
        if copy_encoders:
            encoder_arguments["weights"] = _copy(encoder.source, folder / name).relative_to(folder).as_posix()
        config[name] = {
            "class": type(encoder).__name__,
            "arguments": encoder_arguments,
            "copied": copy_encoders,
            "identity": encoder.identity,
        }
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def _copy(source: Path, folder: Path) -> Path:
    """The files of an encoder; returns what ``weights`` must name."""
    if source.is_file():
        folder.mkdir()
        return Path(shutil.copy(source, folder))
    # Not what else a cache or a cloned repository holds: other formats of the same weights, histories.
    suffixes = {".json", ".txt", ".model", ".py", ".safetensors"}
    if not any(source.glob("*.safetensors")):
        suffixes.add(".bin")
    shutil.copytree(
        source, folder, ignore=lambda at, names: [n for n in names if Path(at, n).is_file() and Path(n).suffix not in suffixes]
    )
    return folder


def load_dual_encoder(folder: str | Path, trust_remote_code: bool = False) -> DualEncoder:
    """The model that ``stages=[export]`` wrote, on the CPU, in eval mode.

    Args:
        trust_remote_code: run the Python code an encoder of the directory brings along; refused otherwise.

    Raises:
        UserError: not such a directory, or encoders other than those the head was trained on.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / CONFIG).read_text())
        written = config["format"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is no exported dual encoder: {CONFIG} cannot be read ({error}).") from error
    if written not in (FORMAT, SAIL_FORMAT):
        raise UserError(f"{folder} is of the format '{written}'; this code reads '{FORMAT}' and '{SAIL_FORMAT}'.")
    weights = read_tensors(folder / HEAD)
    head = head_from_official(weights) if written == SAIL_FORMAT else _load_head(config, weights)
    vision, text = (_load_encoder(folder, config, name, trust_remote_code) for name in ("vision", "text"))
    return DualEncoder(vision, text, head, tuple(config.get("layers", (None, None)))).eval()


def _load_head(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> nn.Module:
    head = _build(config["head"])
    if config["official"] is not None:
        return _official_names(config["official"]).import_head(dict(weights), head)
    load_strictly(head, dict(weights))
    return head


def _official_names(module: str) -> Any:
    if not (module.startswith(HEADS) and module.endswith(".checkpoint")):
        raise UserError(f"'{module}' holds no official names of heads.")
    return importlib.import_module(module)


def _build(node: Any) -> Any:
    """An object of one of the allowed classes from ``_target_`` and arguments; plain values as they are."""
    if not isinstance(node, Mapping):
        return node
    module, _, name = str(node.get("_target_")).rpartition(".")
    try:
        target = getattr(importlib.import_module(module), name, None) if f"{module}.".startswith(HEADS) else None
    except ModuleNotFoundError:
        target = None
    if not (isinstance(target, type) and issubclass(target, nn.Module) and target.__module__ == module):
        raise UserError(
            f"{CONFIG}: the head may not be built of {node.get('_target_')}, only of classes of {', '.join(HEADS)}."
        )
    arguments = {key: _build(value) for key, value in node.items() if key not in ("_target_", "_partial_")}
    return partial(target, **arguments) if node.get("_partial_") else target(**arguments)


def _load_encoder(folder: Path, config: dict, name: str, trust_remote_code: bool) -> FrozenEncoder:
    try:
        part = config[name]
        cls, arguments, identity = ENCODERS[part["class"]], dict(part["arguments"]), part["identity"]
        if part["copied"]:
            arguments["weights"] = str(folder / arguments["weights"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / CONFIG}: '{name}' is not a known encoder with its arguments ({error!r}).") from error
    if arguments.get("trust_remote_code") and not trust_remote_code:
        raise UserError(
            f"the {name} encoder {arguments['name']} brings its own Python code. Read it, then load the directory with "
            "trust_remote_code=True."
        )
    encoder = cls(**arguments)
    if json.loads(json.dumps(encoder.identity)) != identity:
        changed = [key for key, value in json.loads(json.dumps(encoder.identity)).items() if identity.get(key) != value]
        raise UserError(
            f"the {name} encoder {arguments['name']} is not the one this head was trained on: {', '.join(changed)} differ. "
            "Its weights or this library's preprocessing have changed since the export."
        )
    return encoder
