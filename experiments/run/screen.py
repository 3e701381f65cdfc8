"""Tables on the screen."""

from __future__ import annotations

from rich.console import Console


def console() -> Console:
    """As wide as the terminal. On a pipe rich would wrap at 80 columns and tear names apart: 160 there."""
    return Console(width=None if Console().is_terminal else 160, highlight=False)
