"""Command-line overrides: what they name, and how a dotted one may add an argument that no YAML file mentions."""

from __future__ import annotations

import re
from collections.abc import Iterable

DOTTED = re.compile(r"(?!hydra\.)[A-Za-z_]\w*(\.[\w-]+)+=")


def creating(overrides: Iterable[str]) -> list[str]:
    """Overrides of dotted names with ``++``, which sets a key whether a YAML file mentions it or not.

    YAML files hold only what differs from a constructor's defaults, so any other argument is set this way. Whether the
    constructor takes it is checked afterwards (:mod:`experiments.config.validation`).
    """
    return [f"++{override}" if DOTTED.match(override) else override for override in overrides]


def key_of(override: str) -> str:
    """The key or group an override sets: ``optimizer.lr`` of ``++optimizer.lr=1e-4``."""
    return override.split("=", 1)[0].lstrip("+~")
