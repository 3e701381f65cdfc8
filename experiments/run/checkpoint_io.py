"""Checkpoints as directories: weights in safetensors, the trainer's state as tensors and primitives, replaced atomically."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins import CheckpointIO
from safetensors.torch import save_file

from models.io import CheckpointError, atomic_directory, read_tensors

WEIGHTS, TRAINER, META = "weights.safetensors", "trainer.pt", "checkpoint.json"


class DirectoryCheckpointIO(CheckpointIO):
    """Reads and writes ``weights.safetensors`` + ``trainer.pt`` + ``checkpoint.json`` in one directory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        state = dict(checkpoint)
        # A clone per tensor: safetensors refuses tensors that share memory (tied weights).
        weights = {k: v.detach().cpu().contiguous().clone() for k, v in state.pop("state_dict").items()}
        with atomic_directory(Path(path)) as folder:
            save_file(weights, folder / WEIGHTS)
            torch.save(_plain(state, "checkpoint"), folder / TRAINER)
            meta = {"global_step": state.get("global_step"), "epoch": state.get("epoch"), "torch": torch.__version__}
            (folder / META).write_text(json.dumps(meta, indent=1))

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        path = Path(path)
        if not (path / TRAINER).is_file():
            raise CheckpointError(f"{path} is not a checkpoint directory of this project: it lacks {TRAINER}.")
        try:
            state = torch.load(path / TRAINER, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a broken or hostile file
            raise CheckpointError(f"{path / TRAINER} cannot be read ({error}). Resume from another checkpoint.") from error
        return {**state, "state_dict": read_tensors(path / WEIGHTS)}

    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(path, ignore_errors=True)


def _plain(value: Any, where: str) -> Any:
    """Only what ``weights_only=True`` reads back; anything else is a bug of ours, found at the first save."""
    if value is None or isinstance(value, (bool, int, float, str, torch.Tensor)):
        return value
    if isinstance(value, dict):
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise TypeError(f"{where} holds a {type(value).__name__}; checkpoints hold tensors and primitives only")
