"""Overrides of commands and sweeps: what they name, and how a dotted one may add an argument that no YAML file mentions."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

CONF = Path(__file__).resolve().parents[2] / "conf"
DOTTED = re.compile(r"(?!hydra\.(?!launcher\.|sweeper\.(?!params)))[A-Za-z_]\w*(\.[\w-]+)+=")
HOME = re.compile(r"(?<=[=\[,'\"])~(?=/)")  # where a shell does not expand it


def creating(overrides: Iterable[str]) -> list[str]:
    """Overrides as Hydra takes them.

    Dotted names get ``++``, which sets a key whether a YAML file mentions it or not: files hold only what differs from a
    constructor's defaults. Whether the constructor takes the key is checked afterwards (:mod:`experiments.config.validation`).
    ``group=null`` becomes the group's option ``none``, and ``~/`` at the start of a value the home folder.
    """
    return [_as_hydra_takes_it(override) for override in overrides]


def _as_hydra_takes_it(override: str) -> str:
    group, _, value = override.partition("=")
    if value == "null" and (CONF / group / "none.yaml").is_file():
        return f"{group}=none"
    override = HOME.sub(str(Path.home()), override)
    return f"++{override}" if DOTTED.match(override) else override


def as_written(overrides: Iterable[str]) -> list[str]:
    """Overrides as a user writes them in a command: without the ``++`` that :func:`creating` adds."""
    plain = [(override, override.removeprefix("++")) for override in overrides]
    return [short if DOTTED.match(short) else override for override, short in plain]


def key_of(override: str) -> str:
    """The key or group an override sets: ``optimizer.lr`` of ``++optimizer.lr=1e-4``."""
    return override.split("=", 1)[0].lstrip("+~")
