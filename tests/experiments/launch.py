"""Starts run.py as a user does, in a process of its own, with everything it writes below a temporary folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(folder: Path, *overrides: str) -> list[str]:
    places = [f"paths.outputs={folder / 'outputs'}", f"paths.data={folder / 'data'}"]
    return [sys.executable, str(ROOT / "run.py"), *overrides, *places]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache"), "WANDB_MODE": "offline"}


def launch(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(folder, *overrides),
        env=environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def runs(folder: Path, experiment: str) -> list[Path]:
    return sorted((folder / "outputs" / experiment).glob("*/"))


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())
