"""One progress display for all long work: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

log = logging.getLogger("run")
SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_DRAWINGS = 0.2


class Progress:
    """``with Progress("encode images", total=5000) as progress: progress.advance(64)``."""

    def __init__(self, label: str, total: int, start: int = 0):
        self.label, self.total, self.done, self.start = label, total, start, start
        self.began = self.last_line = time.monotonic()
        self.bars: Bars | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self.bars = Bars(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), transient=True)
            self.task = self.bars.add_task(label, total=total, completed=start, rate="", note="")

    def __enter__(self) -> Progress:
        if self.bars:
            self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.bars:
            self.bars.stop()
        if exc[0] is None and self.done > self.start:
            seconds = time.monotonic() - self.began
            log.info("%s: %d in %.1f s (%.1f/s)", self.label, self.done - self.start, seconds, self._rate())

    def _rate(self) -> float:
        return (self.done - self.start) / max(time.monotonic() - self.began, 1e-9)

    def advance(self, amount: int = 1, note: Callable[[], str] = str) -> None:
        """``note`` is asked for only when it is shown, a few times per second at most: a loss may be on another device."""
        self.done += amount
        rate = self._rate()
        if self.bars:
            if time.monotonic() - self.last_line > SECONDS_BETWEEN_DRAWINGS or self.done >= self.total:
                self.last_line = time.monotonic()
                self.bars.update(self.task, completed=self.done, rate=f"{rate:.1f}/s", note=note())
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            left = (self.total - self.done) / max(rate, 1e-9)
            share = 100 * self.done / max(self.total, 1)
            log.info(
                "%s: %d/%d (%.0f %%), %.1f/s, %.0f s left %s", self.label, self.done, self.total, share, rate, left, note()
            )
