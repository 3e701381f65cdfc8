"""One job of a sweep as a process of its own: its command line, its directory, how it ended.

Hydra imports its launchers and sweepers whenever it starts, so torch is imported here only once jobs run.
"""

from __future__ import annotations

import ast
import copy
import gc
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from hydra import initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments.config.overrides import as_written
from experiments.config.signatures import is_ours
from models.errors import UserError

RUN = Path(__file__).resolve().parents[2] / "run.py"


class Job(NamedTuple):
    """One job of a sweep.

    Attributes:
        config: the job's configuration as Hydra composed it for the sweep, with its run directory.
        overrides: its overrides, those of the whole sweep included.
        folder: its run directory.
    """

    config: DictConfig
    overrides: list[str]
    folder: Path

    @property
    def title(self) -> str:
        return self.folder.name

    def command_line(self) -> list[str]:
        """Overrides that make this job a single run in its directory, in any process on any machine that sees the folder."""
        from experiments.run.directory import quoted

        return [*self.overrides, "hydra.mode=RUN", f"paths.run={quoted(self.folder)}"]

    def record(self) -> dict[str, Any]:
        """The content of the job's run.json, empty where there is none or it cannot be read."""
        try:
            return json.loads((self.folder / "run.json").read_text())
        except (OSError, ValueError):
            return {}

    def is_finished(self) -> bool:
        """Whether every stage that the sweep asks for is done."""
        record = self.record()
        done = {name for name, facts in record.get("stages", {}).items() if facts.get("status") == "done"}
        return record.get("status") == "finished" and done.issuperset(self.config.stages)

    def reason_to_skip(self, retry_failed: bool) -> str | None:
        """Why the job is not started: finished, pruned, failed before, in use; None where it is to be started."""
        if self.is_finished():
            return "finished"
        from experiments.run.directory import holder_of

        if holder := holder_of(self.folder):
            return f"in use by {holder}"
        status = self.record().get("status")
        if status == "pruned" or (status == "failed" and not retry_failed):
            return f"{status} before"
        return None

    def result(self, reason: str | None = None) -> JobReturn:
        """What Hydra is told of the job.

        Args:
            reason: why the job has no result; null: it is read from the directory.
        """
        job_return = JobReturn(overrides=self.overrides, cfg=self.config, working_dir=str(self.folder))
        if reason is None:
            job_return.status, job_return._return_value = JobStatus.COMPLETED, self._objective()
        else:
            job_return.status, job_return._return_value = JobStatus.FAILED, UserError(reason)
        return job_return

    def _objective(self) -> float | None:
        file = self.folder / "result.json"
        if not self.config.optimize or not file.is_file():
            return None
        return json.loads(file.read_text())["metrics"].get(self.config.optimize)


def job_of(context: HydraContext, config: DictConfig, overrides: Sequence[str], index: int) -> Job:
    """The job of a sweep with these overrides, with its directory made."""
    from experiments.run.directory import slug

    job_config = context.config_loader.load_sweep_config(config, list(overrides))
    OmegaConf.update(job_config, "hydra.job.id", f"{job_config.hydra.job.name}_{index}", force_add=True)
    OmegaConf.update(job_config, "hydra.job.num", index, force_add=True)
    folder = (Path(str(config.hydra.sweep.dir)) / slug(list(overrides))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    job_config.paths.run = str(folder)
    return Job(job_config, list(overrides), folder)


def why_it_failed(job: Job, exit_code: int) -> str:
    """One line on a process that ended with this exit code (negative: a signal)."""
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        memory = " (the system may have run out of memory)" if name == "SIGKILL" else ""
        return f"killed by {name}{memory}; started again, the job goes on. {job.folder / 'console.log'}"
    log = job.folder / "console.log"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    errors = [line for line in lines if line.startswith("Error: ")]
    return (errors or lines or [f"exit code {exit_code}"])[-1].removeprefix("Error: ")


def modules_of(config: DictConfig) -> list[str]:
    """The modules of this project in which a configuration's targets live, then what their functions import when called."""

    def targets(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("_target_"), str):
                yield node["_target_"]
            node = list(node.values())
        for inner in node if isinstance(node, list) else ():
            yield from targets(inner)

    ours = {target.rpartition(".")[0] for target in targets(OmegaConf.to_container(config)) if is_ours(target)}
    files = [file for name in ours if (file := RUN.parent.joinpath(*name.split(".")).with_suffix(".py")).is_file()]
    later = {name for file in files for name in _imported_by_functions(file)}
    return [*sorted(ours), *sorted(later - ours)]


def _imported_by_functions(file: Path) -> Iterator[str]:
    functions = [node for node in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(node, ast.FunctionDef)]
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def become(run: Callable[[], int], console: Path, environment: dict[str, str]) -> NoReturn:
    """Turn this process into a run; it was forked from one that has imported :mod:`experiments.sweeps.warm`.

    Args:
        run: :func:`run_composed` or :func:`run_here` with its argument; returns the exit code.
        console: file that the output is appended to.
        environment: variables set for the job, such as its GPUs and OMP_NUM_THREADS.
    """
    gc.freeze()
    gc.enable()
    import torch

    os.setsid()  # Ctrl-C is the launcher's: it tells the jobs to save and stop
    _end_with_parent()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):  # which torch has read before the fork
        torch.set_num_threads(int(threads))
    streams = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(streams, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    print(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')}")
    leave_with(run())


def run_composed(job: Job) -> int:
    """Run a job in this process, with the configuration that Hydra has composed for it; returns its exit code."""
    from experiments import runner
    from experiments.config import validation
    from experiments.config.explanation import explain
    from experiments.config.resolvers import register_resolvers
    from run import keep_freed_memory

    keep_freed_memory()
    register_resolvers()
    print(*as_written(job.overrides))
    sys.argv = [str(RUN), *job.overrides]
    HydraConfig.instance().set_config(job.config)
    config = copy.deepcopy(job.config)
    with open_dict(config):
        del config["hydra"]
    try:
        with initialize_config_dir(str(RUN.parent / "conf"), version_base="1.3"):  # stages compose variants of the run
            validation.check(config)
            runner.run(config)
    except BaseException as error:  # explained, with its exit code
        return explain(error)
    return 0


def findable() -> None:
    """Let every Python process that this one starts find the project, from any directory."""
    places = [str(RUN.parent), str(RUN.parent / "experiments" / "plugins"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(places)


def run_here(arguments: Sequence[str]) -> int:
    """Run ``python run.py <arguments>`` in this process; returns its exit code."""
    sys.argv = [str(RUN), *arguments]
    try:
        runpy.run_path(str(RUN), run_name="__main__")
        return 0
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def leave_with(code: int) -> NoReturn:
    """End a forked process without what its parent has registered for its own end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _end_with_parent() -> None:
    """Ask Linux for a SIGTERM when the launcher dies, so that no job is left behind."""
    try:
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL("libc.so.6").prctl(pr_set_pdeathsig, signal.SIGTERM)
    except (OSError, AttributeError):
        pass  # not Linux: jobs of a killed launcher run to their end
