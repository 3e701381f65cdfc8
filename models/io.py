"""Reading tensors that others wrote, writing files that are either whole or absent, and hashing both."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pickletools
import re
import shutil
import socket
import uuid
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import UserError

if TYPE_CHECKING:  # what reads tensors imports torch: the command line and launchers of sweeps use the rest without it
    from torch import Tensor, nn

# Keys under which training scripts file the weights beside epoch, optimizer and the like.
WRAPPERS = ("state_dict", "model_state_dict", "model", "teacher", "module")

# Modules and builtins whose functions have no place in weights: a file that names one is an attack, not a quirk.
DANGEROUS_MODULES = frozenset(
    "os posix nt sys subprocess shutil socket pty runpy importlib ctypes code commands webbrowser pickle _pickle".split()
)  # fmt: skip
DANGEROUS_BUILTINS = frozenset("eval exec execfile compile open input __import__ breakpoint apply".split())

LARGEST_PICKLE = 2**16  # bytes of the description of one tensor
LARGEST_OLD_FILE = 2**30  # bytes of a file from before torch 1.6, which is one pickle

READY = ".ready"  # suffix of a directory that is whole and about to replace another

# Errors of writing that only the user can fix: a disk that is full or read-only, a limit, a missing permission.
CANNOT_WRITE = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM))


class CheckpointError(UserError):
    """A file cannot be read as weights. The message names the file, what is wrong with it and what to do."""


class WriteError(UserError):
    """A file cannot be written. The message names it and the reason; what stood in its place before is untouched."""

    def __init__(self, path: str | os.PathLike[str], reason: object):
        super().__init__(f"cannot write {path} ({reason}). What was there is untouched. Make room, or write to another folder.")


# ---------------------------------------------------------------------------------------------------- reading tensors


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a weights file, on the CPU, by name.

    Reads safetensors and torch files (``.pt``, ``.pth``, ``.ckpt``, ``.bin``; told apart by content). Torch files go
    through the weights-only unpickler: nothing in them is ever executed, objects of foreign classes (a training
    script's config, say) become inert placeholders and are dropped. A dict that only wraps the weights
    (``{"epoch": …, "state_dict": …}``, see ``WRAPPERS``) is unwrapped; other nesting is refused.

    Raises CheckpointError for a missing, truncated, foreign or malicious file.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no weights file at {path}.")
    with path.open("rb") as file:
        head = file.read(16)
    # A safetensors file is the length of its JSON header as a little-endian uint64, then the header.
    if len(head) > 8 and head[8:9] == b"{" and head[7] == 0:
        try:
            return load_file(path)
        except Exception as error:  # the parser's own exception is not exported under a stable name
            raise CheckpointError(f"{path} is a damaged safetensors file ({error}): fetch or write it again.") from error
    if not (head.startswith(b"PK\x03\x04") or head.startswith(b"\x80")):
        raise CheckpointError(
            f"{path} is not a checkpoint: it is neither a safetensors nor a torch file (it begins with {head!r}). "
            "A failed download often leaves a text or HTML page under the file's name: look at it and fetch it again."
        )
    return _state_dict(_load_torch(path), path)


def _load_torch(path: Path) -> Any:
    import torch

    names = _globals_of(path)
    for name in names:
        module, _, attribute = name.rpartition(".")
        if module.split(".")[0] in DANGEROUS_MODULES or (
            module in ("builtins", "__builtin__") and attribute in DANGEROUS_BUILTINS
        ):
            raise CheckpointError(
                f"{path} asks to call {name} while it is read. Weights never need that: the file was refused and "
                "nothing in it was executed. Get the weights from a source you trust, as safetensors if you can."
            )
    # torch looks at its own list of harmless globals first, so only unknown names meet their placeholder.
    placeholders: list[Any] = [(type(name.rpartition(".")[2], (_Placeholder,), {}), name) for name in names]
    try:
        with torch.serialization.safe_globals(placeholders):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile or damaged stream can fail anywhere in the unpickler
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{path} cannot be read as tensors: it is truncated, damaged, or not a checkpoint. Fetch it again, or convert "
            f"it to safetensors where it was written. ({reason})"
        ) from error


def read_tensor(path: str | os.PathLike[str]) -> Tensor:
    """The tensor that a torch file holds alone, mapped from the disk: its numbers are read where they are used.

    Raises CheckpointError for a missing, damaged or hostile file, also one that claims more numbers than it holds.
    """
    import torch

    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(e.filename.endswith("data.pkl") and e.file_size > LARGEST_PICKLE for e in archive.infolist()):
                    raise ValueError("its description is larger than that of any tensor")
        elif path.stat().st_size > LARGEST_OLD_FILE:
            raise ValueError("it is no zip file: saved by a torch before 1.6")
        tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"it holds a {type(tensor).__name__}")
        if tensor.nbytes > path.stat().st_size:
            raise ValueError(f"its shape {tuple(tensor.shape)} is larger than the file")
        return tensor
    except Exception as error:  # a damaged or hostile file can fail anywhere in the unpickler
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(f"{path} cannot be read as a tensor ({reason}): write it again.") from error


class _Placeholder:
    """Stands in for an object of a class that is not ours: takes anything, keeps nothing, does nothing."""

    def __new__(cls, *arguments: Any) -> _Placeholder:
        return object.__new__(cls)

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _globals_of(path: Path) -> list[str]:
    """Every ``module.name`` the file's pickle refers to, read from its opcodes without running them."""
    names: set[str] = set()
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    if member.endswith("data.pkl"):
                        with archive.open(member) as stream:
                            names |= _globals_of_stream(stream)
        else:
            with path.open("rb") as stream:
                # The old format is five pickles in a row (magic, version, system, object, storage keys), then bytes.
                for _ in range(5):
                    names |= _globals_of_stream(stream)
    except (ValueError, zipfile.BadZipFile, EOFError, OSError):
        pass  # damaged: torch.load says how
    return sorted(names)


def _globals_of_stream(stream: Any) -> set[str]:
    names: set[str] = set()
    texts: list[str] = []  # operands of STACK_GLOBAL, newest last
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name == "GLOBAL":
            names.add(argument.replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL" and len(texts) >= 2:
            names.add(".".join(texts[-2:]))
        elif isinstance(argument, str):
            texts.append(argument)
    return names


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    import torch

    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not a state dict. Save `model.state_dict()` instead of the model "
            "object where it was written."
        )
    for wrapper in WRAPPERS:  # first, since a wrapper may hold a stray tensor (a step count) beside the weights
        if isinstance(content.get(wrapper), Mapping):
            return _state_dict(content[wrapper], path)
    tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(
            f"{path} holds no tensors: its keys are {sorted(map(str, content))[:8]}, and none of {list(WRAPPERS)} is a dict "
            "of weights. Save the state dict alone, or under one of those keys."
        )
    return tensors


def load_strictly(
    module: nn.Module, weights: Mapping[str, Tensor], optional: tuple[str, ...] = (), source: object = "this checkpoint"
) -> list[str]:
    """Load ``weights`` into ``module``; both sides must have the same names and shapes.

    Args:
        module: keeps its own values where ``weights`` may lack them: ``optional`` and the batch counters of old batch norms.
        weights: by the module's names.
        optional: beginnings of names that ``weights`` may lack.
        source: file that the message names.

    Returns the names that ``weights`` lacks, sorted. Raises CheckpointError with every difference, and loads nothing then.
    """
    state = module.state_dict()
    absent = sorted(state.keys() - weights.keys())
    differences = {
        "missing": [n for n in absent if not n.startswith(optional) and not n.endswith("num_batches_tracked")],
        "unexpected": sorted(weights.keys() - state.keys()),
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
            for name, value in state.items()
            if name in weights and weights[name].shape != value.shape
        ],
    }
    if any(differences.values()):
        report = "; ".join(
            f"{kind}: {', '.join(names[:6])}" + (f" and {len(names) - 6} more" if len(names) > 6 else "")
            for kind, names in differences.items()
            if names
        )
        raise CheckpointError(
            f"the weights of {source} do not fit this {type(module).__name__}: {report}. Give the sizes and parts that they "
            "were trained with, or another file."
        )
    module.load_state_dict(weights, strict=False)
    return absent


# ------------------------------------------------------------------------------------------------------ atomic writing


@contextlib.contextmanager
def explained(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns a full or read-only disk and a missing permission into a :class:`WriteError` that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        raise WriteError(path, error) from error


@contextlib.contextmanager
def exclusive(path: str | os.PathLike[str]) -> Iterator[None]:
    """Waits until no other process is inside for the same ``path``, which need not exist yet: one job writes what several need.

    The lock is a hidden file beside it; it ends with the process. Where the file system has no locks, or nothing can be
    written, nobody waits.
    """
    lock = Path(path).with_name(f".{Path(path).name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except OSError:  # read-only: what is there can be read, and whoever must write is told why that fails
        yield
        return
    with file:
        with contextlib.suppress(OSError):
            fcntl.lockf(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside ``path``; what was written there replaces ``path`` in one step on success.

    After an exception ``path`` is as it was. Makes the parent directory. Raises WriteError where the disk is full or
    read-only.
    """
    path = Path(path)
    with explained(path):
        temporary = _beside(path)
        try:
            yield temporary
            _sync(temporary)
            os.replace(temporary, path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], sync: bool = True) -> Iterator[Path]:
    """Yields an empty temporary directory beside ``path`` that becomes ``path`` on success.

    A directory already at ``path`` is moved aside first and removed after the rename. A crash between the two renames
    leaves both directories whole and ``path`` absent; :func:`recover` completes the replacement. After an exception
    ``path`` is as it was. ``sync=False`` leaves it to the system when the files reach the disk: for thousands of small
    ones that can be made again. Raises WriteError where the disk is full or read-only.
    """
    path = Path(path)
    with explained(path):
        recover(path.parent, path.name)
        temporary = _beside(path)
        ready, replaced = temporary.with_suffix(READY), _beside(path)
        try:
            temporary.mkdir()
            yield temporary
            for folder, _, files in os.walk(temporary) if sync else ():
                for name in files:
                    _sync(Path(folder, name))
                _sync(Path(folder))
            os.rename(temporary, ready)  # the suffix says that the copy is whole
            if path.exists():
                os.rename(path, replaced)
            try:
                os.rename(ready, path)
            except BaseException:
                if replaced.exists() and not path.exists():
                    os.rename(replaced, path)
                raise
            _sync(path.parent)
        finally:
            for leftover in (temporary, ready, replaced):
                shutil.rmtree(leftover, ignore_errors=True)


def recover(folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Complete the replacements that a crash cut short in ``folder``, then remove what else dead writers have left there.

    Args:
        folder: where they wrote. Nobody may be writing there now.
        name: of one directory in a folder where others may be writing: only what dead processes of this machine left of it.
    """
    for leftover in sorted(Path(folder).glob(".*")):
        match = re.fullmatch(r"\.(.+)\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}(\.tmp|\.ready)", leftover.name)
        if match is None or name and (match[1] != name or match[2] != _host() or _is_alive(int(match[3]))):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            path = leftover.with_name(match[1])
            if match[4] == READY and not path.exists():
                os.rename(leftover, path)
            elif leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink()


def _beside(path: Path) -> Path:
    """A fresh hidden name in the same directory, hence on the same file system. It tells whose it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent / f".{path.name}.{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp"


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------- hashing


def stable_hash(obj: Any) -> str:
    """First 16 hex digits of the SHA-256 of the canonical JSON of ``obj`` (raises TypeError on anything else)."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over the names, dtypes, shapes and bytes of tensors; independent of their order and device."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
