"""Runs run.py in forks of one process that has imported the heavy libraries: each launch saves those seconds.

A fork is a process of its own with its own arguments, folder, environment and streams, so run.py meets what a user's shell
gives it; only the imports are warm. Reads one JSON request per line from stdin, answers with the exit code.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WARM = ("torch", "torchvision", "pytorch_lightning", "transformers", "timm", "hydra", "matplotlib.pyplot", "scipy.optimize")


def main() -> None:
    sys.path.insert(0, str(ROOT))
    os.environ["MPLBACKEND"] = "Agg"
    for name in WARM:
        importlib.import_module(name)
    gc.freeze()  # the forks' collectors leave the shared pages alone
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(request)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def _become(request: dict) -> None:
    """Turn this fork into the requested command; never returns."""
    signal.alarm(300)  # a run that hangs is killed, and its exit code says so
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = open(0, closefd=False)
    sys.argv = request["argv"]
    code = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
