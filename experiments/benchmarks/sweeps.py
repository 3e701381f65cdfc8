"""Sixteen short jobs in the pool of this machine, two and four at once, against one after another in one process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = Path(__file__).resolve().parents[2] / "run.py"
JOBS = (
    "experiment=mm_lego_breast_cancer", "stages=[prepare,fit,evaluate,report]", "module=mm_lego/block_small",
    "datamodule.modalities=[genes]", "sweep_name=seeds",
)  # fmt: skip


def _sweep(count: int, *launcher: str) -> tuple[float, float]:
    """Wall and CPU seconds of a sweep of ``count`` jobs, all of its processes together."""
    spent, began = _cpu_seconds(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        seeds = ",".join(map(str, range(1, count + 1)))
        command = [sys.executable, str(RUN), "--multirun", *JOBS, f"seed={seeds}", f"paths.outputs={folder}", *launcher]
        subprocess.run(command, capture_output=True, check=True)
        seconds = time.perf_counter() - began
        with contextlib.suppress(ChildProcessError):
            while True:  # the server that jobs were forked from ends after the launcher, and then counts with its jobs
                os.waitpid(-1, 0)
    return seconds, _cpu_seconds() - spent


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def pool() -> dict[str, float]:
    """Of 16 jobs: seconds, and those of all processors together."""
    pr_set_child_subreaper = 36
    ctypes.CDLL("libc.so.6").prctl(pr_set_child_subreaper, 1)
    measured = {"load_before": os.getloadavg()[0]}
    measured["serial_seconds"], measured["serial_cpu_seconds"] = _sweep(16)
    for jobs in (2, 4):
        seconds, spent = _sweep(16, "hydra/launcher=local_pool", f"hydra.launcher.jobs={jobs}")
        measured[f"of_{jobs}_seconds"], measured[f"of_{jobs}_cpu_seconds"] = seconds, spent
        measured[f"of_{jobs}_over_serial"] = seconds / measured["serial_seconds"]
    return measured


MEASURES = {"pool": pool}
