"""``hydra/launcher=slurm``: every job of a sweep is a task of a SLURM array, through submitit."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from experiments.run.interruption import PREEMPTION
from experiments.sweeps.jobs import Job, findable, job_of, run_here
from experiments.sweeps.screen import Board
from models.errors import UserError


class Slurm(Launcher):
    """Submits the jobs of a sweep as one array and waits for them.

    A job that is preempted or reaches its time limit saves after its current step, is queued again and goes on. Ctrl-C leaves
    the jobs in the queue: the same command watches them again, skips what is finished and submits what is missing.

    Args:
        partition: name of the partition; null: the cluster's default.
        nodes: machines of a job. Set ``trainer.num_nodes`` to the same number.
        gpus_per_node: GPUs and processes on each of them (0: one process on the CPU). Set ``trainer.devices`` to the same.
        cpus_per_task: cores of each process.
        mem_gb: memory of each node in GB; null: the cluster's default.
        timeout_min: time limit of a job in minutes, after which it is queued again.
        requeues: how often a job that reached its time limit is queued again.
        array_parallelism: jobs that run at once at most.
        account: account that is charged; null: the user's default.
        constraint: features that the nodes must have; null: any.
        setup: lines of shell before the job, such as ``module load cuda``.
        seconds_between_looks: how often the queue is asked.
        retry_failed: whether jobs that failed in an earlier start of this sweep are tried again.
        cluster: where submitit runs the jobs: "slurm", or "local" in processes of this machine.
    """

    def __init__(
        self,
        partition: str | None = None,
        nodes: int = 1,
        gpus_per_node: int = 1,
        cpus_per_task: int = 8,
        mem_gb: float | None = None,
        timeout_min: int = 1440,
        requeues: int = 100,
        array_parallelism: int = 256,
        account: str | None = None,
        constraint: str | None = None,
        setup: Sequence[str] = (),
        seconds_between_looks: float = 15.0,
        retry_failed: bool = False,
        cluster: Literal["slurm", "local"] = "slurm",
    ):
        self.cluster, self.requeues, self.seconds, self.retry_failed = cluster, requeues, seconds_between_looks, retry_failed
        self.array_parallelism = array_parallelism
        self.parameters: dict[str, Any] = {
            "nodes": nodes, "tasks_per_node": max(gpus_per_node, 1), "cpus_per_task": cpus_per_task, "timeout_min": timeout_min,
        }  # fmt: skip
        if gpus_per_node:
            self.parameters["gpus_per_node"] = gpus_per_node
        if mem_gb is not None:
            self.parameters["mem_gb"] = mem_gb
        if cluster == "slurm":
            only = {"partition": partition, "account": account, "constraint": constraint, "setup": list(setup) or None}
            self.parameters |= {f"slurm_{name}": value for name, value in only.items() if value is not None}
            self.parameters["slurm_array_parallelism"] = array_parallelism

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit what is not finished, wait for all jobs, and return what became of each, in their order."""
        executor = self._executor()
        jobs = {
            index: job_of(self.context, self.config, overrides, index)
            for index, overrides in enumerate(job_overrides, start=initial_job_idx)
        }
        results: dict[int, JobReturn] = {}
        with Board(len(jobs), self.array_parallelism) as board:
            queued: dict[int, Any] = {}
            for index, job in jobs.items():
                if (submitted := self._in_queue(executor, job)) is not None:
                    queued[index] = submitted
                elif reason := job.reason_to_skip(self.retry_failed):
                    board.skip(job.title, reason)
                    results[index] = job.result(reason if reason == "failed before" else None)
            missing = [index for index in jobs if index not in queued and index not in results]
            with executor.batch():
                queued |= {index: executor.submit(Task(jobs[index].command_line())) for index in missing}
            for index in missing:
                (jobs[index].folder / "slurm.json").write_text(json.dumps({"job": queued[index].job_id}))
            for index in queued:
                board.start(index, jobs[index].title, jobs[index].folder, "")
            while queued:
                time.sleep(self.seconds)
                for index in [index for index, submitted in queued.items() if submitted.done()]:
                    failed = self._why_it_failed(jobs[index], queued.pop(index))
                    board.end(index, failed)
                    results[index] = jobs[index].result(failed)
                board.refresh()
        for index, result in results.items():
            self.context.callbacks.on_job_end(config=jobs[index].config, job_return=result)
        return [results[index] for index in sorted(results)]

    def _executor(self) -> Any:
        try:
            import submitit
        except ImportError as error:
            raise UserError("hydra/launcher=slurm needs submitit: pip install submitit==1.5.4") from error
        findable()  # the nodes unpickle the tasks before run.py sets its own paths
        executor = submitit.AutoExecutor(folder=self._logs(), cluster=self.cluster, slurm_max_num_timeout=self.requeues)
        executor.update_parameters(name=str(self.config.hydra.sweep.dir).rsplit("/", 1)[-1], **self.parameters)
        return executor

    def _logs(self) -> Path:
        return Path(str(self.config.hydra.sweep.dir)).resolve() / "slurm"

    def _in_queue(self, executor: Any, job: Job) -> Any:
        """The job's entry in the queue from an earlier start, if it is still there."""
        file = job.folder / "slurm.json"
        if not file.is_file():
            return None
        submitted = executor.job_class(folder=self._logs(), job_id=json.loads(file.read_text())["job"])
        return None if submitted.done(force_check=True) else submitted

    def _why_it_failed(self, job: Job, submitted: Any) -> str | None:
        if job.is_finished():
            return None
        log = Path(submitted.paths.stderr)
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
        errors = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
        return errors[-1] if errors else f"ended as {submitted.state}; see {log}"


class Task:
    """What submitit runs on a node: one job as a single run, again after it was preempted."""

    def __init__(self, arguments: list[str]):
        self.arguments = arguments

    def __call__(self) -> None:
        code = run_here(self.arguments)
        for signum in PREEMPTION:
            handler: Any = signal.getsignal(signum)
            if code == 128 + signum and callable(handler):
                handler(signum, None)  # submitit's: queues the job again and leaves
        if code:
            raise UserError(f"the job ended with exit code {code}")

    def checkpoint(self) -> Any:
        """What is queued again: the run in its directory goes on from its own checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Task(self.arguments))
