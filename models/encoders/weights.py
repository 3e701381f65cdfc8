"""Find pretrained weights: a path, an installed package, the local model cache, the hub. Never random ones."""

from __future__ import annotations

import functools
import importlib.util
import json
import threading
import urllib.error
import urllib.request
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants

from models.errors import UserError

PACKAGE = "package://"
_PROBE_SECONDS = 3
_TENSOR_FILES = ("*.safetensors", "*.bin", "*.pth", "*.pt")
_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.py"]


class WeightsUnavailable(UserError):
    """Pretrained weights are neither on this machine nor reachable. The message says where to put them."""


def find_weights(name: str, repo_id: str | None, weights: str | None, option: str) -> Path:
    """Return the file or directory that holds the pretrained weights of the model `name`.

    `weights` is a path, or `package://<import name>/<path inside>` for an installed package that carries weights; then only
    that place counts. Without it: the local cache of `repo_id`, then the hub. `option` is the setting that error messages
    tell the user to fill in. Raises WeightsUnavailable.
    """
    if weights is not None:
        path = _inside_package(weights) if weights.startswith(PACKAGE) else Path(weights).expanduser()
        if path is None or not path.exists():
            raise WeightsUnavailable(f"no weights for {name}: {weights} does not exist\n{_remedy(name, repo_id, option)}")
        return path
    looked = [f"the local cache ({constants.HF_HUB_CACHE})"]
    if repo_id is not None:
        cached = _in_cache(repo_id)
        if cached is not None:
            return cached
        if hub_reachable():
            try:
                return _download(repo_id)
            except (OSError, ValueError, RuntimeError) as error:  # every hub and connection error is one of these
                looked.append(f"{constants.ENDPOINT}/{repo_id} ({type(error).__name__}: {str(error).splitlines()[0]})")
        else:
            looked.append(f"{constants.ENDPOINT} (offline or not reachable within {_PROBE_SECONDS} s)")
    raise WeightsUnavailable(f"no weights for {name}; looked in: {'; '.join(looked)}\n{_remedy(name, repo_id, option)}")


@functools.cache
def hub_reachable() -> bool:
    """True if the hub answers within 3 seconds. Asked once per process; HF_HUB_OFFLINE counts as no."""
    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def probe() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_PROBE_SECONDS)
        except urllib.error.HTTPError as error:
            if error.code not in (404, 405):  # a bare mirror; anything else is more likely a proxy that refuses
                return
        except (OSError, ValueError):
            return
        answered.set()

    # A thread, because the name lookup inside ignores socket timeouts.
    threading.Thread(target=probe, daemon=True).start()
    return answered.wait(_PROBE_SECONDS)


def tensor_file(path: Path) -> Path:
    """The one file of tensors at `path` (a file, or a directory that holds it). Raises WeightsUnavailable."""
    if path.is_file():
        return path
    for pattern in _TENSOR_FILES:
        files = sorted(path.glob(pattern))
        if len(files) == 1:
            return files[0]
        if files:
            raise WeightsUnavailable(f"{path} holds several files of weights ({files[0].name}, …); name one of them")
    raise WeightsUnavailable(f"{path} holds no file of weights ({', '.join(_TENSOR_FILES)})")


def _inside_package(weights: str) -> Path | None:
    package, _, inner = weights.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package)  # found, not imported: none of the package's code runs
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / inner


def _in_cache(repo_id: str) -> Path | None:
    try:
        path = Path(huggingface_hub.snapshot_download(repo_id, local_files_only=True))
    except (OSError, ValueError):
        return None
    return path if _complete(path) else None


def _complete(path: Path) -> bool:
    """A cached snapshot may lack files: a download of the tokenizer alone, or one that was cut off between shards."""
    indices = list(path.glob("*.safetensors.index.json")) or list(path.glob("*.bin.index.json"))
    if indices:
        shards = set(json.loads(indices[0].read_text())["weight_map"].values())
        return all((path / shard).exists() for shard in shards)
    return any(True for pattern in _TENSOR_FILES for _ in path.glob(pattern))


def _download(repo_id: str) -> Path:
    for tensors in ("*.safetensors", "*.bin"):
        path = Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=[*_SMALL_FILES, tensors]))
        if _complete(path):
            return path
    raise ValueError(f"the repository {repo_id} holds neither safetensors nor .bin files")


def _remedy(name: str, repo_id: str | None, option: str) -> str:
    if repo_id is None:
        return f"put the file of {name} on this machine and set {option}=/path/to/file"
    folder = repo_id.split("/")[-1]
    return (
        f"on a machine with internet: hf download {repo_id} --local-dir {folder}\n"
        f"then copy that folder here and set {option}=/path/to/{folder}"
    )
