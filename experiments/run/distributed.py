"""Processes of a distributed run: how children join a stage, and how the main process leaves them behind."""

from __future__ import annotations

import os
import sys

import torch.distributed as dist

from experiments.run.directory import Run, quoted

# What Lightning's launcher sets in the main process: left there, the next trainer would wait for children it never started.
LAUNCHED = ("LOCAL_RANK", "NODE_RANK", "GLOBAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OUTSIDE = tuple(name for name in LAUNCHED if name in os.environ)  # set by torchrun or SLURM: theirs to keep


def children_repeat(run: Run) -> None:
    """Make the command line, which Lightning starts for every other rank, the current stage of this job in this directory."""
    repeated = [o for o in run.overrides if not o.startswith(("resume=", "stages="))]
    sys.argv = [sys.argv[0], *repeated, f"stages=[{run.stage}]", "hydra.mode=RUN", f"resume={quoted(str(run.dir))}"]


def leave_group() -> None:
    """After a distributed stage: close the process group, so that the next trainer of this process starts its own."""
    if _OUTSIDE:
        return
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    for name in LAUNCHED:
        os.environ.pop(name, None)
