"""One run and its directory: where it lives, what it is (identity), what it has done (``run.json``), how it is found again."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
import uuid
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import DictConfig, OmegaConf

from experiments.config.overrides import key_of
from experiments.run.ranks import announce, announced, is_main_process, launched_outside
from models.errors import UserError
from models.io import atomic_write, explained, recover, stable_hash

log = logging.getLogger("run")

# What may differ between two starts of the same run: places, what is done with its results, and what changes its speed.
VOLATILE = ("paths", "resume", "logger", "stages", "description", "compare", "pipeline", "predict", "threads", "optimize")
VOLATILE_ANYWHERE = ("num_workers", "every_n_minutes", "log_every_n_steps", "profiler", "sweep_name")


class Run:
    """A run: its configuration, its directory, and the record of what is done, kept on disk after every change."""

    def __init__(self, cfg: DictConfig, folder: Path, overrides: list[str]):
        self.cfg, self.dir, self.overrides = cfg, folder, overrides
        self.path = folder / "run.json"
        self.memory: dict[str, Any] = {}  # what stages share within this process
        self.shared: dict[str, Any] = {}  # data and encoders, shared with the variants of this run
        self.stage = ""  # the one that is running
        self.record: dict[str, Any] = read_record(folder) if self.path.is_file() else {}

    @property
    def notes(self) -> list[str]:
        """What the reader of the result must know: a fallback encoder, skipped samples, an unavailable suite."""
        return self.record["notes"]

    def note(self, text: str) -> None:
        """Say something in the table and result.json, and once in the log, also where compared variants say it again."""
        if text not in self.notes:
            if text not in self.shared.setdefault("logged notes", []):
                log.warning(text)
                self.shared["logged notes"].append(text)
            self.notes.append(text)
            self.save()

    def is_done(self, stage: str) -> bool:
        return self.record["stages"].get(stage, {}).get("status") == "done"

    def facts(self, stage: str) -> dict[str, Any]:
        """What a finished stage left for later ones."""
        return self.record["stages"].get(stage, {}).get("facts", {})

    def finish_stage(self, stage: str, seconds: float, facts: dict[str, Any] | None) -> None:
        self.record["stages"][stage] = {"status": "done", "seconds": round(seconds, 2), "facts": facts or {}}
        self.save()

    def set_status(self, status: str) -> None:
        """Anything but 'running' is the end of the run in this process: others may take the directory."""
        self.record["status"] = status
        self.save()
        if status != "running":
            unlock(self.dir)

    def save(self) -> None:
        if is_main_process():
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(self.record, indent=1))


def read_record(folder: Path) -> dict[str, Any]:
    """The content of a run's ``run.json``. Raises UserError where it is damaged."""
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text())
        if record["identity"] and record["created"] and record["status"] and isinstance(record["stages"], dict):
            return record
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is damaged. Remove the directory of this run, or restore the file, and start again.")


def identity_of(cfg: DictConfig) -> str:
    """Hash of the resolved configuration without what may differ between two starts of the same run."""
    return stable_hash(_lasting(OmegaConf.to_container(cfg, resolve=True)))


def _lasting(content: Any) -> dict[str, Any]:
    """The part of a configuration that decides the results."""

    def prune(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: prune(value) for key, value in node.items() if key not in VOLATILE_ANYWHERE}
        return [prune(item) for item in node] if isinstance(node, list) else node

    return prune({key: value for key, value in content.items() if key not in VOLATILE})


def quoted(value: object) -> str:
    """``value`` as one Hydra override value that means exactly these characters: ``f"resume={quoted(folder)}"``."""
    return QuotedString(str(value), Quote.single).with_quotes().replace("${", r"\${")


# Locks of the run directories that this process works in. POSIX locks: they end with the process, however it ends, and
# neither forked workers nor the other ranks, which write nothing here, hold them.
_LOCKS: dict[Path, IO[str]] = {}


def lock(folder: Path) -> str | None:
    """Take a run directory for this process until :func:`unlock` or its end; returns who has it if another process does."""
    if folder in _LOCKS or not is_main_process():
        return None
    with explained(folder):
        file = (folder / "run.lock").open("a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                return file.read() or "another process"
            log.warning("%s: this file system has no locks (%s). Do not start this run twice at once.", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
    _LOCKS[folder] = file
    return None


def unlock(folder: Path) -> None:
    """Give a run directory free again."""
    if folder in _LOCKS:
        _LOCKS.pop(folder).close()


def holder_of(folder: Path) -> str | None:
    """Process and host of another process that has locked a run directory; None where it is free."""
    if folder in _LOCKS:
        return None
    holder = lock(folder)
    unlock(folder)
    return holder


def open_run(cfg: DictConfig) -> Run:
    """The run this configuration asks for: a fresh directory, or the one that ``resume`` names or finds.

    Raises UserError when ``resume`` names a directory that is no run, or the run of another configuration.
    """
    hydra_cfg = HydraConfig.get()
    overrides = [override for override in hydra_cfg.overrides.task if key_of(override) != "paths.run"]
    name = str(hydra_cfg.runtime.choices.get("experiment") or cfg.name)
    home = Path(cfg.paths.outputs) / name
    identity = identity_of(cfg)
    if cfg.paths.run:
        folder = Path(cfg.paths.run)
    elif launched_outside() and not is_main_process() and cfg.resume in (None, "auto"):
        folder = announced(home)
    elif str(hydra_cfg.mode).endswith("MULTIRUN"):
        folder = Path(hydra_cfg.sweep.dir) / slug(overrides)
    elif cfg.resume == "auto":
        folder = _newest_unfinished(home, identity) or _fresh(home)
    elif cfg.resume:
        folder = Path(cfg.resume)
        if not (folder / "run.json").is_file():
            raise UserError(f"resume={cfg.resume}: there is no run in this directory (no run.json).")
    else:
        folder = _fresh(home)
    run = _enter(cfg, folder.resolve(), name, identity, overrides)
    if launched_outside() and is_main_process() and not cfg.paths.run:
        announce(run.dir, home)
    return run


def _enter(cfg: DictConfig, folder: Path, name: str, identity: str, overrides: list[str]) -> Run:
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if holder := lock(folder):
        raise UserError(f"{folder} is in use by {holder}. Wait for it, stop it, or start a fresh run without resume.")
    if is_main_process():
        for inner in (folder, folder / "checkpoints"):
            recover(inner)
    run = Run(cfg, folder, overrides)
    if run.record and run.record["identity"] != identity:
        unlock(folder)
        raise UserError(
            f"{folder} holds a run of another configuration:\n{_differences(folder, cfg)}\n"
            "Repeat its overrides (see its config.yaml), or start a fresh run: without resume, a sweep with another sweep_name."
        )
    if not run.record:
        created = datetime.now().isoformat(timespec="microseconds")
        run.record = {"experiment": name, "identity": identity, "created": created, "notes": [], "stages": {}}
        run.record |= {"id": uuid.uuid4().hex[:12], "overrides": overrides}
        with atomic_write(folder / "config.yaml") as temporary:
            temporary.write_text(OmegaConf.to_yaml(cfg, resolve=True))
    run.record |= {"status": "running", "host": socket.gethostname(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
    run.record["pid"] = os.getpid()
    run.save()
    return run


def variant_of(run: Run, name: str, cfg: DictConfig, overrides: list[str]) -> Run:
    """The run of a compared variant, in a subdirectory of its parent."""
    folder = run.dir / "compare" / name
    variant = _enter(cfg, folder, f"{run.record['experiment']}:{name}", identity_of(cfg), overrides)
    variant.shared = run.shared
    return variant


def _newest_unfinished(home: Path, identity: str) -> Path | None:
    """The newest unfinished run of this configuration that no other process works on, locked."""
    unfinished = []
    for file in home.glob("*/run.json"):
        try:
            record = read_record(file.parent)
        except UserError as error:
            log.warning("resume=auto leaves out a run: %s", error)
            continue
        same_job = record.get("slurm_job") in (None, os.environ.get("SLURM_JOB_ID"))
        if record["identity"] == identity and record["status"] != "finished" and same_job:
            unfinished.append((record["created"], file.parent.resolve()))
    for created, folder in sorted(unfinished, reverse=True):
        holder = lock(folder)
        if holder is None:
            log.info("resume=auto: going on with %s, begun %s", folder, created)
            return folder
        log.info("resume=auto: %s is in use by %s", folder, holder)
    log.info("resume=auto: no unfinished run of this configuration; starting a fresh one")
    return None


def _fresh(home: Path) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for count in range(100):
        folder = home / (stamp if count == 0 else f"{stamp}_{count}")
        try:
            with explained(folder):
                folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise UserError(f"cannot make a fresh run directory below {home}.")


_COMMAND_LINE: list[str] = []


def slug(overrides: list[str]) -> str:
    """A readable, stable directory name for one job of a sweep: what the sweep varies, not what stands on the command line."""
    if not _COMMAND_LINE:  # as it was typed: fit rewrites sys.argv for the children of DDP, and jobs share the process
        _COMMAND_LINE.extend(sys.argv)
    parts = [
        override.lstrip("+")
        for override in overrides
        if override not in _COMMAND_LINE and key_of(override) not in ("experiment", "sweep")
    ]
    text = ",".join(parts) or "defaults"
    if "/" not in text and len(text) <= 100:
        return text
    return f"{text.replace('/', '-')[:83]}-{stable_hash(parts)}"  # two jobs never share a directory


def _differences(folder: Path, cfg: DictConfig) -> str:
    configs = OmegaConf.load(folder / "config.yaml"), cfg
    lines = differences(*(_lasting(OmegaConf.to_container(config, resolve=True)) for config in configs))
    return "\n".join(f"  {line}" for line in lines[:10])


def differences(there: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each dotted key in which two nested dicts differ, with both values."""
    left, right = _flat(there), _flat(now)
    keys = sorted(left.keys() | right.keys())
    return [f"{k}: {left.get(k, 'absent')} there, {right.get(k, 'absent')} now" for k in keys if left.get(k) != right.get(k)]


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {k: v for key, value in node.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def environment() -> dict[str, Any]:
    """Versions, machine and commit, for result.json."""
    import torch

    packages = ("torch", "pytorch-lightning", "transformers", "timm", "hydra-core")
    facts = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "argv": sys.argv,
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "packages": {name: version(name) for name in packages},
    }
    root = Path(__file__).resolve().parents[2]
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False)
    return {**facts, "commit": git.stdout.strip() or None}
