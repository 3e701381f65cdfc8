"""Sixteen short jobs, four at once in the pool of this machine, against one after another in one process."""

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
POOL = ("hydra/launcher=local_pool", "hydra.launcher.jobs=4")


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
    """Of 16 jobs: the pool's time over that of one after another; and the CPU seconds of each job after the first."""
    pr_set_child_subreaper = 36
    ctypes.CDLL("libc.so.6").prctl(pr_set_child_subreaper, 1)
    load = os.getloadavg()[0]
    serial, serial_cpu = _sweep(16)
    pooled, pooled_cpu = _sweep(16, *POOL)
    _, first = _sweep(1)
    _, first_pooled = _sweep(1, *POOL)
    return {
        "time_over_serial": pooled / serial,
        "cpu_over_serial": pooled_cpu / serial_cpu,
        "cpu_seconds": pooled_cpu,
        "serial_cpu_seconds": serial_cpu,
        "cpu_seconds_per_job": (pooled_cpu - first_pooled) / 15,
        "serial_cpu_seconds_per_job": (serial_cpu - first) / 15,
        "load_before": load,
    }


MEASURES = {"pool_of_four": pool}
