"""Starts run.py as a user does, with everything it writes below a temporary folder."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def command(folder: Path, *overrides: str) -> list[str]:
    places = {"paths.outputs": folder / "outputs", "paths.data": folder / "data"}
    others = [f"{key}={place}" for key, place in places.items() if not any(word.startswith(f"{key}=") for word in overrides)]
    return [sys.executable, str(ROOT / "run.py"), *overrides, *others]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache"), "WANDB_MODE": "offline"}


def launch(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Run the command to its end in a fork of a process with warm imports (see fork_server.py)."""
    argv = command(folder, *overrides)[1:]
    server = _server()
    with tempfile.TemporaryDirectory() as streams:
        out, err = Path(streams, "stdout"), Path(streams, "stderr")
        request = {"cwd": str(folder), "environment": environment(folder), "argv": argv, "stdout": str(out), "stderr": str(err)}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        if not answer:
            raise RuntimeError(f"the fork server ended with code {server.wait()}")
        return subprocess.CompletedProcess(argv, json.loads(answer), out.read_text(), err.read_text())


def launch_cold(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Run the command in a fresh interpreter, as the shell would."""
    return subprocess.run(
        command(folder, *overrides),
        env=environment(folder),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@functools.cache
def _server() -> subprocess.Popen:
    line = [sys.executable, str(Path(__file__).parent / "fork_server.py")]
    # What libraries read when they are imported: the hub's, and OpenMP's, as run.py sets it.
    warm = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=warm)


def runs(folder: Path, experiment: str) -> list[Path]:
    return sorted((folder / "outputs" / experiment).glob("*/"))


def result(run: Path) -> dict:
    return json.loads((run / "result.json").read_text())
