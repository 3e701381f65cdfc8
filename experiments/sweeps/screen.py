"""The jobs of a sweep while they run: a live table on a terminal, a line for each event elsewhere."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NamedTuple

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.run.screen import console


class _Line(NamedTuple):
    title: str
    folder: Path
    devices: str
    began: float


class Board:
    """``with Board(total, places) as board: board.start(...); board.end(...)``.

    Args:
        total: jobs in all; null: unknown.
        places: jobs that run at once.
    """

    def __init__(self, total: int | None, places: int):
        self.total, self.places = total, places
        self.running: dict[int, _Line] = {}
        self.done, self.skipped = 0, 0
        self.failed: list[str] = []
        self.seconds: list[float] = []  # of the jobs that ended
        self.live = Live(console=console(), refresh_per_second=2, transient=True) if sys.stdout.isatty() else None

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live:
            self.live.stop()
        print(f"jobs: {self.done} done, {self.skipped} skipped, {len(self.failed)} failed", flush=True)

    def skip(self, title: str, reason: str) -> None:
        self.skipped += 1
        self._say(f"skipped, {reason}: {title}")

    def start(self, index: int, title: str, folder: Path, devices: str) -> None:
        self.running[index] = _Line(title, folder, devices, time.monotonic())
        self._say(f"started{f' on GPU {devices}' if devices else ''}: {title}")

    def end(self, index: int, failed: str | None) -> None:
        line = self.running.pop(index)
        seconds = time.monotonic() - line.began
        self.seconds.append(seconds)
        if failed:
            self.failed.append(f"{line.title}: {failed}")
            self._say(f"failed: {line.title}: {failed}")
        else:
            self.done += 1
            self._say(f"done in {seconds:.0f} s: {line.title} ({self._summary()})")

    def refresh(self) -> None:
        if not self.live:
            return
        table = Table(box=None)
        for column in ("job", "GPU", "time", "last line of run.log"):
            table.add_column(column, overflow="ellipsis", no_wrap=True)
        for line in self.running.values():
            age = f"{time.monotonic() - line.began:.0f} s"
            table.add_row(Text(line.title), line.devices, age, Text(_last_line(line.folder / "run.log")))
        self.live.update(Group(table, Text(self._summary())))

    def _summary(self) -> str:
        ended = self.done + self.skipped + len(self.failed)
        text = f"{ended}{f' of {self.total}' if self.total else ''} ended, {len(self.failed)} failed"
        if self.total and self.seconds:
            left = self.total - ended
            text += f", about {left * sum(self.seconds) / len(self.seconds) / self.places:.0f} s left"
        return text

    def _say(self, text: str) -> None:
        if self.live:
            self.live.console.print(Text(text))
        else:
            print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 400))
            lines = file.read().decode(errors="replace").splitlines()
        return lines[-1] if lines else ""
    except OSError:
        return ""
