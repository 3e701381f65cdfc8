"""One run and its directory: where it lives, what it is (identity), what it has done (``run.json``), how it is found again."""

from __future__ import annotations

import json
import logging
import os
import platform
import socket
import subprocess
import sys
import time
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from experiments.config.overrides import key_of
from models.errors import UserError
from models.io import atomic_write, stable_hash

log = logging.getLogger("run")

# What may differ between two starts of the same run.
VOLATILE = ("paths", "resume", "logger", "stages", "description", "compare", "pipeline", "predict")


class Run:
    """A run: its configuration, its directory, and the record of what is done, kept on disk after every change."""

    def __init__(self, cfg: DictConfig, folder: Path, overrides: list[str]):
        self.cfg, self.dir, self.overrides = cfg, folder, overrides
        self.path = folder / "run.json"
        self.memory: dict[str, Any] = {}  # what stages share within this process
        self.shared: dict[str, Any] = {}  # data and encoders, shared with the variants of this run
        self.stage = ""  # the one that is running
        self.record: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    @property
    def notes(self) -> list[str]:
        """What the reader of the result must know: a fallback encoder, skipped samples, an unavailable suite."""
        return self.record["notes"]

    def note(self, text: str) -> None:
        """Say something loudly, once, in the log, the table and result.json."""
        if text not in self.notes:
            log.warning(text)
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
        self.record["status"] = status
        self.save()

    def save(self) -> None:
        if is_main_process():
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(self.record, indent=1))


def identity_of(cfg: DictConfig) -> str:
    """Hash of the resolved configuration without what may differ between two starts of the same run."""
    content = OmegaConf.to_container(cfg, resolve=True)
    return stable_hash({key: value for key, value in content.items() if key not in VOLATILE})


def open_run(cfg: DictConfig) -> Run:
    """The run this configuration asks for: a fresh directory, or the one that ``resume`` names or finds.

    Raises UserError when ``resume`` names a directory that is no run, or the run of another configuration.
    """
    hydra_cfg = HydraConfig.get()
    overrides = list(hydra_cfg.overrides.task)
    name = str(hydra_cfg.runtime.choices.get("experiment") or cfg.name)
    home = Path(cfg.paths.outputs) / name
    identity = identity_of(cfg)
    if str(hydra_cfg.mode).endswith("MULTIRUN"):
        folder = Path(hydra_cfg.sweep.dir) / _slug(overrides)
    elif cfg.resume == "auto":
        folder = _newest_unfinished(home, identity) or _fresh(home)
    elif cfg.resume:
        folder = Path(cfg.resume)
        if not (folder / "run.json").is_file():
            raise UserError(f"resume={cfg.resume}: there is no run in this directory (no run.json).")
    else:
        folder = _fresh(home)
    return _enter(cfg, folder.resolve(), name, identity, overrides)


def _enter(cfg: DictConfig, folder: Path, name: str, identity: str, overrides: list[str]) -> Run:
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(cfg, folder, overrides)
    if run.record and run.record["identity"] != identity:
        raise UserError(
            f"{folder} holds a run of another configuration:\n{_differences(folder, cfg)}\n"
            "Repeat its overrides (see its config.yaml), or start a fresh run without resume."
        )
    if not run.record:
        run.record = {"experiment": name, "identity": identity, "created": _now(), "notes": [], "stages": {}}
        run.record["overrides"] = overrides
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
    candidates = []
    for file in home.glob("*/run.json"):
        record = json.loads(file.read_text())
        same_job = record.get("slurm_job") in (None, os.environ.get("SLURM_JOB_ID"))
        unfinished = record["identity"] == identity and record["status"] != "finished"
        if unfinished and same_job and not _is_alive(record):
            candidates.append((record["created"], file.parent))
    if not candidates:
        log.info("resume=auto: no unfinished run of this configuration; starting a fresh one")
        return None
    folder = max(candidates)[1]
    log.info("resume=auto: going on with %s", folder)
    return folder


def _is_alive(record: dict) -> bool:
    if record["status"] != "running" or record.get("host") != socket.gethostname() or record["pid"] == os.getpid():
        return False
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _fresh(home: Path) -> Path:
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for count in range(100):
        folder = home / (stamp if count == 0 else f"{stamp}_{count}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise UserError(f"cannot make a fresh run directory below {home}.")


_COMMAND_LINE: list[str] = []


def _slug(overrides: list[str]) -> str:
    """A readable, stable directory name for one job of a sweep: what the sweep varies, not what stands on the command line."""
    if not _COMMAND_LINE:  # as it was typed: fit rewrites sys.argv for the children of DDP, and jobs share the process
        _COMMAND_LINE.extend(sys.argv)
    parts = [
        override.lstrip("+")
        for override in overrides
        if override not in _COMMAND_LINE and key_of(override) not in ("experiment", "sweep")
    ]
    text = ",".join(part.replace("/", "-") for part in parts) or "defaults"
    return text if len(text) <= 100 else f"{text[:83]}-{stable_hash(parts)}"


def _differences(folder: Path, cfg: DictConfig) -> str:
    old, new = OmegaConf.load(folder / "config.yaml"), OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    left, right = _flat(old), _flat(new)
    keys = [k for k in sorted(left.keys() | right.keys()) if k.split(".")[0] not in VOLATILE]
    lines = [f"  {k}: {left.get(k, 'absent')} there, {right.get(k, 'absent')} now" for k in keys if left.get(k) != right.get(k)]
    return "\n".join(lines[:10])


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    container = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    if not isinstance(container, dict):
        return {prefix: container}
    return {k: v for key, value in container.items() for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def quoted(value: str) -> str:
    """A value of a Hydra override, safe whatever characters it holds."""
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _now() -> str:
    return datetime.now().isoformat(timespec="microseconds")


def is_main_process() -> bool:
    """True for the process that writes: rank 0, also before the process group exists."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("SLURM_PROCID", 0)) == 0


def environment() -> dict[str, Any]:
    """Versions, machine and commit, for result.json."""
    import torch

    packages = ("torch", "pytorch-lightning", "transformers", "timm", "hydra-core")
    found = {
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
    return {**found, "commit": git.stdout.strip() or None}
