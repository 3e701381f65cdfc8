"""Is the configuration sound? Answered from YAML and source alone, before torch is imported, in one complete list.

Each problem names the key, the YAML file (or the command line) it came from, and the nearest right name. Errors that
Hydra raises while composing get the same treatment in :func:`explain`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from experiments.config.overrides import key_of
from experiments.config.signatures import PACKAGES, UnknownTarget, is_ours, mismatch, signature_of
from models.errors import UserError

CONF = Path(__file__).resolve().parents[2] / "conf"
# Whose classes and functions `_target_` may name: this project's packages, and libraries that build models and trainers.
# A configuration that comes with a checkpoint from elsewhere cannot call anything else.
TRUSTED = (*PACKAGES, "torch.nn", "torch.optim", "timm", "transformers", "pytorch_lightning", "torchmetrics", "lion_pytorch")
HYDRA_KEYS = {"_target_", "_partial_", "_args_", "_recursive_", "_convert_"}
# Plain values of the root and their types; every other key of the root is a node.
VALUES: dict[str, tuple[type, ...]] = {
    "name": (str,), "description": (str,), "seed": (int,), "stages": (list,), "resume": (str, type(None)),
    "checkpoint": (str, type(None)), "sweep_name": (str, type(None)), "select": (str,),
    "optimize": (str, type(None)), "threads": (int, type(None)), "trusted_packages": (list,),
    "compile": (bool,), "tf32": (bool,), "activation_checkpointing": (bool,),
    "micro_batch_size": (int, type(None)),
}  # fmt: skip


class ConfigError(UserError):
    """The configuration cannot run; the message lists every problem found."""


def check(cfg: DictConfig) -> None:
    """Raise ConfigError with all problems that can be seen without importing torch."""
    sources = Sources()
    written = OmegaConf.to_container(cfg, resolve=False)
    missing = [
        f"{key}: a value is required. Give it on the command line: {key}=<value> [{sources.of(key)}]"
        for key in sorted(_missing(written))
    ]
    try:
        config: Any = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationToMissingValueError:
        raise _problems(missing) from None
    except OmegaConfBaseException as error:
        key = error.full_key or ""
        raise ConfigError(f"{key}: {str(error).splitlines()[0]} [{sources.of(key)}]") from None
    problems = [*_top_level(config, sources), *_added(config, sources), *missing]
    trusted = (*TRUSTED, *map(str, config.get("trusted_packages") or ()))
    problems += _targets(config, written, "", sources, trusted)
    if problems:
        raise _problems(problems)


def _missing(node: Any, path: str = "") -> Iterator[str]:
    """Dotted keys without a value. OmegaConf's own search fails where a value refers to a missing one."""
    if node == "???":
        yield path
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        inner = f"[{key}]" if isinstance(node, list) else f".{key}"
        yield from _missing(value, (path + inner).lstrip("."))


def _problems(problems: Sequence[str]) -> ConfigError:
    return ConfigError("\n".join(["The configuration cannot run:", *(f"  - {p}" for p in problems)]))


def nearest(name: str, choices: Any) -> str:
    """' Did you mean ...?' or, where nothing is near, the list of choices; empty when there are none."""
    choices = sorted(map(str, choices))
    lower = {choice.lower(): choice for choice in choices}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    if close and lower[close[0]] != name:
        return f" Did you mean '{lower[close[0]]}'?"
    return f" Choices: {', '.join(choices)}." if choices else ""


def keys_like(name: str) -> str:
    """' Did you mean optimizer.lr?' for the name of an argument alone: dotted keys of the group files that end with it."""
    leaves: dict[str, set[str]] = {}
    for file in CONF.rglob("*.yaml"):
        group = file.relative_to(CONF).parts[0]
        if group not in ("experiment", "sweep", "debug", "pipeline", "config.yaml"):
            for key in _tree(file):
                leaves.setdefault(str(key), set()).add(f"{group}.{key}")
    close = difflib.get_close_matches(name, [*leaves], n=1, cutoff=0.7)
    return f" Did you mean {' or '.join(sorted(leaves[close[0]]))}?" if close else ""


def known_keys() -> set[str]:
    """The vocabulary of the root: its own keys, the groups, and what pipelines add."""
    files = [CONF / "config.yaml", *(file for file in (CONF / "pipeline").glob("*.yaml") if _is_global(file))]
    keys = {key for file in files for key in _tree(file)} - {"defaults", "hydra"}
    return keys | {folder.name for folder in CONF.iterdir() if folder.is_dir()} - {"experiment", "sweep", "debug", "hydra"}


def _top_level(config: dict, sources: Sources) -> Iterator[str]:
    stages = config["stages"] if isinstance(config.get("stages"), list) else []
    if not config.get("module") and (config["pipeline"].get("fit") or not stages):
        yield f"no experiment chosen. Run `make list`, then: python run.py experiment=<name>.{nearest('', _experiments())}"
        return
    known = known_keys()
    for key, value in config.items():
        if key not in known:
            yield f"{key}: unknown key.{nearest(key, known)} [{sources.of(key)}]"
        elif key not in VALUES:
            for path, node in ((key, value), *_subgroups(key, value)):
                if node is not None and not isinstance(node, dict):
                    group = path.replace(".", "/")
                    yield f"{path}: expected a mapping, got {node!r}. Choose an option of a group with {group}={node}."
        elif not isinstance(value, VALUES[key]) or (isinstance(value, bool) and bool not in VALUES[key]):
            expected = " or ".join("null" if t is type(None) else t.__name__ for t in VALUES[key])
            yield f"{key}: expected {expected}, got {value!r} [{sources.of(key)}]"
    evaluation = config.get("evaluation") if isinstance(config.get("evaluation"), dict) else {}
    suites = [name for name, suite in evaluation.items() if isinstance(suite, dict) and "_target_" in suite]
    for name, suite in evaluation.items():
        if suite not in (None, "???") and name not in suites:
            problem = f"evaluation.{name}: this evaluation has no suite '{name}'."
            yield f"{problem}{nearest(name, suites)} [{sources.of(f'evaluation.{name}')}]"
    choices = [name for name, function in config["pipeline"].items() if function]
    for stage in stages:
        if stage not in choices:
            yield f"stages: unknown stage '{stage}'.{nearest(str(stage), choices)} [{sources.of('stages')}]"
    if config.get("select") not in ("best", "last"):
        yield f"select: expected 'best' or 'last', got {config.get('select')!r} [{sources.of('select')}]"

    for key, least in (("seed", 0), ("threads", 1), ("micro_batch_size", 1)):
        if isinstance(config.get(key), int) and config[key] < least:
            yield f"{key}: expected at least {least}, got {config[key]} [{sources.of(key)}]"


def _subgroups(key: str, value: Any) -> list[tuple[str, Any]]:
    """The groups below a group, such as encoder/vision, with their nodes."""
    if not isinstance(value, dict) or any((CONF / key).glob("*.yaml")) or not (CONF / key).is_dir():
        return []
    return [(f"{key}.{folder.name}", value.get(folder.name)) for folder in (CONF / key).iterdir() if folder.is_dir()]


def _added(config: dict, sources: Sources) -> Iterator[str]:
    """Problems of dotted overrides that set a key which neither a file mentions nor a constructor takes."""
    for override in sources.overrides:
        key = key_of(override)
        if not override.startswith("++") or sources.file_of(key):
            continue
        *ancestors, _ = key.split(".")
        node: Any = config
        for part in ancestors:
            node = node.get(part) if isinstance(node, dict) else None
            if isinstance(node, dict) and "_target_" in node:
                break  # an argument, or within one: checked where the target is
        else:
            yield f"unknown key '{key}' [command line].{nearest(key.rpartition('.')[2], siblings_of(key))}"


def _targets(node: Any, written: Any, path: str, sources: Sources, trusted: Sequence[str]) -> Iterator[str]:
    """Problems of every ``_target_`` node. ``written`` is the node before interpolation: a reference to another node is a
    string there, and is checked only where it was written."""
    if isinstance(node, list) and isinstance(written, list):
        for position, (item, source) in enumerate(zip(node, written, strict=True)):
            yield from _targets(item, source, f"{path}[{position}]", sources, trusted)
    if not isinstance(node, dict) or not isinstance(written, dict):
        return
    target = node.get("_target_")
    if target is not None and not (isinstance(target, str) and target.startswith(tuple(f"{name}." for name in trusted))):
        yield (
            f"{path}._target_: {target!r} is of no package that a configuration may call ({', '.join(trusted)}). If you trust "
            f"it, add it: 'trusted_packages=[<package>]' [{sources.of(f'{path}._target_')}]"
        )
    elif target is not None and is_ours(target):
        yield from _arguments(node, target, path, sources)
    for key, value in node.items():
        yield from _targets(value, written[key], f"{path}.{key}" if path else key, sources, trusted)


def _elsewhere(config: Any, name: str, path: str = "") -> Iterator[str]:
    """The dotted keys of a configuration that end with ``name``."""
    if isinstance(config, dict):
        for key, value in config.items():
            inner = f"{path}.{key}" if path else str(key)
            if key == name:
                yield inner
            yield from _elsewhere(value, name, inner)


def _arguments(node: dict, target: str, path: str, sources: Sources) -> Iterator[str]:
    try:
        signature = signature_of(target)
    except UnknownTarget as error:
        yield f"{path}._target_: {error}.{nearest(target, error.choices)} [{sources.of(f'{path}._target_')}]"
        return
    for key, value in node.items():
        if key in HYDRA_KEYS or (key == "fallback" and path.startswith("encoder.")):  # the runner's, not the encoder's
            continue
        where = f"{path}.{key}"
        if key not in signature.parameters:
            if not signature.open_ended:
                hint = nearest(key, signature.parameters)
                if where == "datamodule.simulate":  # sizes that an option of `debug` sets
                    hint = " This data is not simulated: leave the sizes of a simulated set out with '~datamodule.simulate'."
                yield f"{where}: {target} takes no argument '{key}'.{hint} [{sources.of(where)}]"
            continue
        expected = mismatch(signature.parameters[key].annotation, value)
        if expected and value != "???":
            yield f"{where}: expected {expected}, got {_short(value)} [{sources.of(where)}]"
    if not node.get("_partial_"):
        for name, parameter in signature.parameters.items():
            if parameter.required and name not in node:
                yield f"{path}: {target} needs '{name}'. Give it: {path}.{name}=<value> [{sources.of(path)}]"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _experiments() -> list[str]:
    folder = CONF / "experiment"
    return [p.relative_to(folder).with_suffix("").as_posix() for p in sorted(folder.rglob("*.yaml"))]


class Sources:
    """Where a key of the composed configuration was written: a YAML file below ``conf/`` or the command line."""

    def __init__(self) -> None:
        if HydraConfig.initialized():
            hydra_cfg = HydraConfig.get()
            self.overrides = list(hydra_cfg.overrides.task)
            self.choices = dict(hydra_cfg.runtime.choices)
        else:
            self.overrides, self.choices = [], {}

    def of(self, key: str) -> str:
        key = re.sub(r"\[\d+\]", "", key)
        for override in self.overrides:
            name = key_of(override)
            if name == key or key.startswith(name + ".") and "." in name:
                return "command line"
        file = self.file_of(key)
        if file:
            return f"conf/{file.relative_to(CONF).as_posix()}"
        return f"conf/{key.split('.')[0]}/" if (CONF / key.split(".")[0]).is_dir() else "conf/config.yaml"

    def file_of(self, key: str) -> Path | None:
        """The file that writes ``key``; the nearest one, where files inherit."""
        return next((file for file, prefix in self._files() if _has(_tree(file), key, prefix)), None)

    def _files(self) -> Iterator[tuple[Path, str]]:
        first = ("debug", "sweep", "experiment", "pipeline")  # what they write counts more than the options they name
        for group in sorted(self.choices, key=lambda name: first.index(name) if name in first else len(first)):
            if self.choices[group] and (CONF / group).is_dir():
                for file in _with_bases(CONF / group / f"{self.choices[group]}.yaml"):
                    yield file, "" if _is_global(file) else group.replace("/", ".")
        yield CONF / "config.yaml", ""


@cache
def _tree(file: Path) -> dict:
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {}


def _is_global(file: Path) -> bool:
    return file.read_text(encoding="utf-8").startswith("# @package _global_")


def _with_bases(file: Path) -> Iterator[Path]:
    """A file and those it inherits from, nearest first."""
    if not file.is_file():
        return
    yield file
    for entry in _tree(file).get("defaults", []):
        if isinstance(entry, str) and entry.startswith("/"):
            yield from _with_bases(CONF / f"{entry.split('@')[0].lstrip('/')}.yaml")
        elif isinstance(entry, str) and entry != "_self_":
            yield from _with_bases(file.parent / f"{entry.split('@')[0]}.yaml")


def _has(tree: Any, key: str, prefix: str) -> bool:
    if prefix:
        if key != prefix and not key.startswith(prefix + "."):
            return False
        key = key[len(prefix) + 1 :]
    for part in filter(None, key.split(".")):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def siblings_of(key: str) -> set[str]:
    """Keys that stand beside ``key`` in any file of its group: candidates for what a misspelled override meant."""
    group, *rest = key.split(".")
    keys: set[str] = set()
    files = [*(CONF / group).rglob("*.yaml"), *(CONF / "experiment").rglob("*.yaml"), CONF / "config.yaml"]
    for file in files:
        tree = _tree(file)
        inside = tree.get(group, {}) if file.parent.name == "experiment" or file.name == "config.yaml" else tree
        for part in rest[:-1]:
            inside = inside.get(part, {}) if isinstance(inside, dict) else {}
        if isinstance(inside, dict):
            keys |= {str(k) for k in inside} - HYDRA_KEYS - {"defaults"}
    return keys
