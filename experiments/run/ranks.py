"""Which process of a job this is, also before the process group exists."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """True for the process that writes: rank 0."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))
