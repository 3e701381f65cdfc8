"""Which process of a job this is, also before the process group exists, and how ranks agree on their run directory."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.io import atomic_write

SECONDS_TO_WAIT = 1800  # for rank 0, which may import from a cold disk


def is_main_process() -> bool:
    """True for the process that writes: rank 0."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def launched_outside() -> bool:
    """Whether torchrun or srun started all ranks of this job, each with the user's command."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ.get("WORLD_SIZE", 1)) > 1
    return "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def announce(folder: Path, home: Path) -> None:
    """Rank 0 of a job that was launched outside tells the others its run directory.

    Args:
        folder: the run directory.
        home: a directory that all ranks see, for a note where SLURM started them.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _store().set(_key(), str(folder))
    else:
        with atomic_write(home / _key()) as temporary:
            temporary.write_text(str(folder))


def announced(home: Path) -> Path:
    """The run directory that rank 0 announced; waits for it. Raises UserError where rank 0 stays away."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Path(_store().get(_key()).decode())
    note, began = home / _key(), time.monotonic()
    while not note.is_file():
        if time.monotonic() - began > SECONDS_TO_WAIT:
            raise UserError(f"rank 0 has not begun a run within {SECONDS_TO_WAIT // 60} minutes, or {home} is not shared.")
        time.sleep(0.2)
    return Path(note.read_text())


def _key() -> str:
    """A name that no other launch has."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"run_directory/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return ".launch-" + "-".join(os.environ.get(name, "0") for name in names)


def _store() -> Any:
    """The key-value store that torchrun serves for this launch."""
    from datetime import timedelta

    from torch.distributed import TCPStore

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise UserError("this launcher serves no store in which ranks can agree: give the directory, paths.run=<folder>.")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timedelta(seconds=SECONDS_TO_WAIT))
