"""``compile=true``: the networks of a module through torch.compile, and how often they were compiled again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch._dynamo import utils

if TYPE_CHECKING:
    from lightning_modules.base import BaseModule

REMEMBERED = 10_000  # compilations of which torch keeps a record


def compile_networks(module: BaseModule, backend: str = "inductor") -> None:
    """Compile what :meth:`BaseModule.compiled_parts` names, each by itself and in place: names and state dicts do not change.

    Compilation begins with the first call. Every device and precision may use it; what cannot be compiled runs as before.
    """
    utils.set_compilation_metrics_limit(REMEMBERED)
    utils.clear_compilation_metrics()
    for part in module.compiled_parts():
        part.compile(backend=backend)


def counted() -> dict[str, int]:
    """Compilations since :func:`compile_networks`, and how many of them were made because an earlier one did not fit."""
    records = utils.get_compilation_metrics()
    return {"compilations": len(records), "recompilations": sum(bool(record.recompile_reason) for record in records)}
