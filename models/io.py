"""Safe reading and atomic writing, used by every layer.

Pickles from strangers never run code: they are read with ``weights_only=True``, and where a file drags foreign classes
along (argparse namespaces, configuration objects), those become inert placeholders while the tensors are kept.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.errors import UserError

WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher", "module")


class CheckpointError(UserError):
    """A file that should hold weights does not, or must not be trusted."""


class _Inert:
    """Stands in for a foreign class: accepts whatever the pickle gives it and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> _Inert:
        return self


# What a checkpoint of tensors needs; every other global becomes inert. Nothing here can reach the system.
_ALLOWED = {
    ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
    ("torch._utils", "_rebuild_tensor"), ("torch", "Size"), ("torch", "device"), ("builtins", "set"),
    ("torch.serialization", "_get_layout"), ("torch._tensor", "_rebuild_from_type_v2"),
}  # fmt: skip
_FORBIDDEN = {"os", "posix", "nt", "subprocess", "sys", "shutil", "socket", "runpy", "importlib", "pty", "commands"}


class _InertPickle:
    """The pickle module as torch.load wants it, with an unpickler that imports tensors' helpers and nothing else."""

    __name__ = "inert_pickle"

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            root = module.split(".")[0]
            if root in _FORBIDDEN or (root in ("builtins", "__builtin__") and name in ("eval", "exec", "open", "getattr")):
                raise CheckpointError(f"it tries to call {module}.{name}: a malicious pickle")
            if (module, name) in _ALLOWED or (module == "torch" and name.endswith(("Storage", "Tensor"))):
                return super().find_class(module, name)
            if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            return type(name, (_Inert,), {})

    @staticmethod
    def load(file: Any, **kwargs: Any) -> Any:
        return _InertPickle.Unpickler(file, **kwargs).load()


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file by name, on the CPU.

    Reads safetensors and torch files (``.pt``, ``.pth``, ``.ckpt``, ``.bin``); looks through wrappers such as
    ``{"epoch": …, "state_dict": …}``. Raises CheckpointError for a missing, truncated, foreign or malicious file.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no weights file at {path}.")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file ({error}). Fetch or write it again.") from error
    return _tensors_of(_read_pickle(path), path)


def _read_pickle(path: Path) -> Any:
    if path.stat().st_size == 0:
        raise CheckpointError(f"{path} is empty. Fetch it again.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as first:  # torch raises many kinds; the second reading tells foreign classes from a broken file
        try:
            return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_InertPickle)
        except CheckpointError as error:
            raise CheckpointError(f"{path} is refused: {error}. Nothing of it was run. Do not use this file.") from None
        except Exception:
            whole = "" if zipfile.is_zipfile(path) else " It is truncated, or not a checkpoint at all."
            raise CheckpointError(f"{path} cannot be read as a checkpoint.{whole} ({_first_line(first)})") from first


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    while isinstance(content, dict) and not any(isinstance(v, Tensor) for v in content.values()):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            break
        content = inner
    if isinstance(content, dict):
        for key in WRAPPERS:  # a wrapper may hold a stray tensor (a step count) beside the weights
            if isinstance(content.get(key), dict) and any(isinstance(v, Tensor) for v in content[key].values()):
                content = content[key]
                break
        tensors = {str(k): v.detach() for k, v in content.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
    raise CheckpointError(f"{path} holds no tensors under any of the usual names ({', '.join(WRAPPERS)}).")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; on success it is synced to disk and takes the place of ``path``."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """Yields an empty temporary directory; on success it is synced and takes the place of ``path``, old content and all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    old = temporary.with_name(temporary.name + ".old")
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        temporary.chmod(0o755)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        _sync(path.parent)
    finally:
        if old.exists() and not path.exists():  # the second rename failed: put the old one back
            os.rename(old, path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def stable_hash(value: Any) -> str:
    """16 hex digits that depend on the JSON content of ``value`` alone, not on the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, shapes, types and bytes of all tensors, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
