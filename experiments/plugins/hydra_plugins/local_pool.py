"""``hydra/launcher=local_pool``: the jobs of a sweep side by side on this machine, each in its own process."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from experiments.sweeps.jobs import Job, become, findable, job_of, modules_of, run_composed, why_it_failed
from experiments.sweeps.screen import Board

TABLE = ("experiments.sweeps.page", "matplotlib.pyplot")  # what the launcher itself needs for the sweep's table


class _Running(NamedTuple):
    job: Job
    process: Any
    devices: str
    began: float


class LocalPool(Launcher):
    """Runs as many jobs at once as there are places, each in its own process with its own GPUs.

    The launcher skips finished jobs, continues those that were cut off, and leaves jobs alone that another process works on.
    Ctrl-C stops all jobs after their current step, with a checkpoint; the same command goes on.

    Args:
        jobs: how many run at once; null: one for each group of GPUs, without a GPU one for each core.
        gpus_per_job: GPUs that each job sees (CUDA_VISIBLE_DEVICES). With more jobs than groups, jobs share them.
        stagger_seconds: least time between two starts.
        retry_failed: whether jobs that failed in an earlier start of this sweep are tried again.
    """

    def __init__(
        self, jobs: int | None = None, gpus_per_job: int = 1, stagger_seconds: float = 0.0, retry_failed: bool = False
    ):
        self.gpus_per_job, self.stagger_seconds, self.retry_failed = gpus_per_job, stagger_seconds, retry_failed
        devices = visible_gpus()
        self.groups = [
            ",".join(devices[start : start + gpus_per_job]) for start in range(0, len(devices) - gpus_per_job + 1, gpus_per_job)
        ]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.jobs = jobs or len(self.groups) or cores
        self.threads = max(1, cores // self.jobs)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config
        # Jobs are forked from a server that has imported what they need. It does so while the sweep is composed.
        findable()
        multiprocessing.forkserver.set_forkserver_preload(["experiments.sweeps.warm", *modules_of(config)])
        multiprocessing.forkserver.ensure_running()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; returns what became of each, in their order."""
        results: dict[int, JobReturn] = {}
        waiting = iter(enumerate(job_overrides, start=initial_job_idx))
        self.stream(lambda: next(waiting, None), results.__setitem__, len(job_overrides))
        return [results[index] for index in sorted(results)]

    def stream(
        self,
        source: Callable[[], tuple[int, Sequence[str]] | None],
        done: Callable[[int, JobReturn], None],
        total: int | None = None,
    ) -> None:
        """Run jobs as they come.

        Args:
            source: asked for the number and the overrides of the next job when a place is free; null: there is none now.
            done: told what became of a job.
            total: how many jobs there will be, for the time left; null: unknown.
        """
        server = multiprocessing.get_context("forkserver")
        for name in TABLE:
            importlib.import_module(name)  # while the server imports, too
        free = [self.groups[place % len(self.groups)] if self.groups else "" for place in range(self.jobs)]
        running: dict[int, _Running] = {}
        last_start = 0.0
        with Board(total, self.jobs) as board, _interruptible():
            try:
                while True:
                    while free and time.monotonic() - last_start >= self.stagger_seconds and (following := source()):
                        index, overrides = following
                        job = job_of(self.context, self.config, overrides, index)
                        if reason := job.reason_to_skip(self.retry_failed):
                            board.skip(job.title, reason)
                            self._finish(job, index, job.result(reason if reason == "failed before" else None), done)
                            continue
                        devices, last_start = free.pop(0), time.monotonic()
                        running[index] = self._start(server, job, devices)
                        board.start(index, job.title, job.folder, devices)
                    if not running and (not free or (following is None)):
                        return
                    multiprocessing.connection.wait([each.process.sentinel for each in running.values()], timeout=0.25)
                    for index in [i for i, each in running.items() if each.process.exitcode is not None]:
                        each = running.pop(index)
                        free.append(each.devices)
                        failed = None if each.process.exitcode == 0 else why_it_failed(each.job, each.process.exitcode)
                        board.end(index, failed)
                        self._finish(each.job, index, each.job.result(failed), done)
                    board.refresh()
            except BaseException:
                _stop([each.process for each in running.values()])
                raise

    def _start(self, server: Any, job: Job, devices: str) -> _Running:
        environment = {"OMP_NUM_THREADS": str(self.threads)} | ({"CUDA_VISIBLE_DEVICES": devices} if devices else {})
        process = server.Process(target=become, args=(partial(run_composed, job), job.folder / "console.log", environment))
        process.start()
        return _Running(job, process, devices, time.monotonic())

    def _finish(self, job: Job, index: int, result: JobReturn, done: Callable[[int, JobReturn], None]) -> None:
        self.context.callbacks.on_job_end(config=job.config, job_return=result)
        done(index, result)


def visible_gpus() -> list[str]:
    """Names of the GPUs this process may use, as CUDA_VISIBLE_DEVICES takes them, found without starting CUDA."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    try:
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(number) for number, line in enumerate(listing.splitlines()) if line.startswith("GPU ")]


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM to the launcher is what Ctrl-C is."""

    def on_signal(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(processes: Sequence[Any]) -> None:
    """Ask the jobs to save and leave, and wait for them; a second Ctrl-C kills them."""
    for process in processes:
        process.terminate()
    if processes:
        print(f"stopping {len(processes)} jobs after their step; Ctrl-C again kills them", flush=True)
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        for process in processes:
            process.kill()
        raise
