"""Checkpoints as directories: weights in safetensors, the trainer's state as tensors and primitives, replaced atomically."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import save_file

from models.io import CheckpointError, WriteError, atomic_directory, hash_file, read_tensors

WEIGHTS, TRAINER, META = "weights.safetensors", "trainer.pt", "checkpoint.json"


class DirectoryCheckpointIO(CheckpointIO):
    """Reads and writes ``weights.safetensors`` + ``trainer.pt`` + ``checkpoint.json`` (with checksums) in one directory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        state = dict(checkpoint)
        # A clone per tensor: safetensors refuses tensors that share memory (tied weights).
        weights = {k: v.detach().cpu().contiguous().clone() for k, v in state.pop("state_dict").items()}
        meta = {name: state.get(name) for name in ("global_step", "epoch", "metrics_bytes")}
        state = _plain(state, "checkpoint")
        with atomic_directory(Path(path)) as folder:
            try:
                save_file(weights, folder / WEIGHTS)
                torch.save(state, folder / TRAINER)
            except (RuntimeError, SafetensorError) as error:  # what they make of a full disk
                raise WriteError(path, error) from error
            meta |= {"torch": torch.__version__, "sha256": {name: hash_file(folder / name) for name in (WEIGHTS, TRAINER)}}
            (folder / META).write_text(json.dumps(meta, indent=1))

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(path)
        weights = read_weights(path)
        _verify(path, TRAINER)
        try:
            state = torch.load(path / TRAINER, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a broken or hostile file
            raise CheckpointError(f"{path / TRAINER} cannot be read ({error}). Resume from another checkpoint.") from error
        return {**state, "state_dict": weights}

    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(path, ignore_errors=True)


def read_meta(path: Path) -> dict[str, Any]:
    """``global_step``, ``epoch``, ``metrics_bytes`` (size of metrics.csv when it was saved) and checksums of a checkpoint."""
    try:
        meta = json.loads((path / META).read_text())
        if isinstance(meta["sha256"], dict) and isinstance(meta["global_step"], int):
            return meta
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise CheckpointError(
        f"{path} is not a whole checkpoint of this version: {META} is absent, damaged or without checksums. Its weights, if "
        f"they are sound, can be taken with checkpoint={path / WEIGHTS}."
    )


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint directory. Raises CheckpointError where they are damaged."""
    meta = path / META
    if meta.is_file() and '"sha256"' in meta.read_text():  # others' directories and older ones hold no checksums
        _verify(path, WEIGHTS)
    return read_tensors(path / WEIGHTS)


def newest_sound(folder: Path, names: Sequence[str] = ("last", "best")) -> tuple[Path | None, list[str]]:
    """The first checkpoint of ``names`` that is undamaged (None without one), and what is wrong with those before it."""
    problems: list[str] = []
    for path in (folder / name for name in names):
        if path.is_dir():
            try:
                for file in (WEIGHTS, TRAINER):
                    _verify(path, file)
                return path, problems
            except CheckpointError as error:
                problems.append(str(error))
    return None, problems


def _verify(path: Path, file: str) -> None:
    expected = read_meta(path)["sha256"].get(file)
    if not (path / file).is_file():
        raise CheckpointError(f"{path} is not a checkpoint directory of this project: it lacks {file}.")
    if hash_file(path / file) != expected:
        raise CheckpointError(f"{path / file} is damaged: its checksum is not the one in {META}. Use another checkpoint.")


def _plain(value: Any, where: str) -> Any:
    """Only what ``weights_only=True`` reads back; anything else is a bug of ours, found at the first save."""
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor)):
        return value
    if isinstance(value, dict):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where} holds a {type(value).__name__}; checkpoints hold tensors and primitives only")
