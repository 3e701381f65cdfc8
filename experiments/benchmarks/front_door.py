"""How long a user waits for help or for the answer to a mistake."""

from __future__ import annotations

import subprocess
import sys
import time
from functools import partial
from pathlib import Path

RUN = Path(__file__).resolve().parents[2] / "run.py"


def _seconds(*arguments: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, str(RUN), *arguments], capture_output=True, check=False)
    return time.perf_counter() - began


MEASURES = {
    "help_seconds": partial(_seconds, "--help"),
    "config_error_seconds": partial(_seconds, "experiment=sail_dinov2", "seed=x"),
}
