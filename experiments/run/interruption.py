"""Ctrl-C and SIGTERM: finish the step, save, leave. A second signal leaves at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(BaseException):
    """The run was asked to stop. Not an Exception, so that nothing between the signal and the exit swallows it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class _State:
    received: int | None = None
    deferred = False


def received() -> int | None:
    """The signal that asked this run to stop, if any."""
    return _State.received


@contextmanager
def listening() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into :class:`Interrupted`, raised where the code stands unless it is deferred."""

    def on_signal(signum: int, frame: object) -> None:
        if _State.received is not None:  # asked twice: do not wait for anything
            os._exit(128 + signum)
        _State.received = signum
        if not _State.deferred:
            raise Interrupted(signum)

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    _State.received = None
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside, a signal only sets :func:`received`; the code asks for it where stopping loses nothing."""
    _State.deferred = True
    try:
        yield
    finally:
        _State.deferred = False
    if _State.received is not None:
        raise Interrupted(_State.received)
