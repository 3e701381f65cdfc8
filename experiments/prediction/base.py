"""What every prediction ends with: the table on screen and the same in a file."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType

from experiments.run import screen
from experiments.run.directory import Run
from models.io import atomic_write

log = logging.getLogger("run")


def write(run: Run, predictions: Sequence[dict[str, Any]], *shown: RenderableType) -> None:
    """Print ``shown`` (tables, lines) and write ``predictions``, one dict per input, to ``predictions.json`` of the run."""
    console = screen.console()
    for part in shown:
        console.print(part)
    path = run.dir / "predictions.json"
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(predictions, indent=1))
    log.info("predictions are in %s", path)
