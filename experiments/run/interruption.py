"""Ctrl-C, SIGTERM, and a cluster's warnings: finish the step, save, leave. A second signal leaves at once."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from experiments.run.ranks import is_main_process

if TYPE_CHECKING:
    import pytorch_lightning as pl


PREEMPTION = (signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(BaseException):
    """The run was asked to stop. Not an Exception, so that nothing between the signal and the exit swallows it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        # Lightning kills the main process when another rank ends with a code other than 0; the main process tells.
        self.exit_code = 128 + signum if is_main_process() else 0


class _State:
    received: int | None = None
    listening = False
    deferred = False


def received() -> int | None:
    """The signal that asked this run to stop, if any."""
    return _State.received


def check() -> None:
    """Raise :class:`Interrupted` if the run was asked to stop."""
    if _State.received is not None:
        raise Interrupted(_State.received)


@contextmanager
def listening() -> Iterator[None]:
    """Turn SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 (of SLURM, before it preempts a job or ends its time) into
    :class:`Interrupted`, raised where the code stands unless it is deferred.
    """

    def on_signal(signum: int, frame: object) -> None:
        if _State.received is not None and {_State.received, signum} & set(PREEMPTION):
            return  # a cluster's warnings come in sequence, and the step is being finished
        if _State.received is not None:  # asked twice: do not wait for anything
            os._exit(Interrupted(signum).exit_code)
        _State.received = signum
        if not _State.deferred:
            raise Interrupted(signum)

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM, *PREEMPTION)}
    _State.received, _State.listening = None, True
    try:
        yield
    finally:
        _State.listening = False
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def requeue(signum: int) -> None:
    """In a SLURM job that was warned of its end: queue it again. Jobs that submitit started are queued by submitit."""
    job = os.environ.get("SLURM_JOB_ID")
    if signum in PREEMPTION and job and is_main_process() and "SUBMITIT_EXECUTOR" not in os.environ:
        subprocess.run(["scontrol", "requeue", job], check=False)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal only sets :func:`received`; the code asks for it where stopping loses nothing.

    An error inside counts as the consequence of the signal where there was one: reading workers that it has ended, say.
    """
    _State.deferred = True
    try:
        yield
    except Exception:
        check()
        raise
    finally:
        _State.deferred = False
    check()


@contextmanager
def handled_here(trainer: pl.Trainer) -> Iterator[None]:
    """Runs a trainer with this module's handlers instead of Lightning's. Unless signals are deferred, when all ranks stop in
    the same step, an interruption of the main process ends the others.

    Lightning's handler broadcasts among the ranks, which hangs unless all of them receive the signal in the same step, and
    its training loop asks for the signal with a broadcast and a synchronisation of the device in every step.
    """
    connector: Any = trainer._signal_connector
    epoch_loop: Any = trainer.fit_loop.epoch_loop
    connector.register_signal_handlers = epoch_loop._broadcast_sigterm_tensor = lambda: None
    try:
        yield
    except Interrupted:
        if not _State.deferred and trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGTERM)
        raise


def _leave_process_group() -> None:
    if _State.listening:
        os.setpgid(0, 0)


# A signal to the whole process group (Ctrl-C in a terminal) is for the main process; the forked workers that read for it
# must live until its step is done. Workers end by themselves when their parent does.
os.register_at_fork(after_in_child=_leave_process_group)
