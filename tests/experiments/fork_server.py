"""Runs run.py in forks of one process that has imported the heavy libraries: each launch saves those seconds.

A fork is a process of its own with its own arguments, folder, environment and streams, so run.py meets what a user's shell
gives it; only the imports are warm. Reads one JSON request per line from stdin, answers with the exit code.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    os.environ["MPLBACKEND"] = "Agg"
    for name in ("experiments.sweeps.warm", "timm", "torchvision", "transformers", "sklearn.base"):
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def _become(request: dict) -> None:
    """Turn this fork into the requested command; never returns."""
    gc.freeze()
    gc.enable()
    signal.alarm(300)  # a run that hangs is killed, and its exit code says so
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = open(0, closefd=False)
    from experiments.sweeps import jobs

    jobs.leave_with(jobs.run_here(request["argv"][1:]))


if __name__ == "__main__":
    main()
