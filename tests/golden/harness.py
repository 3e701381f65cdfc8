"""Compares our outputs with reference vectors made by the official code.

A file holds ``weights.*`` (official names), ``inputs.*``, ``outputs.*`` and metadata: family, kind, config, rtol, atol,
source, notes. The module ``tests/golden/<family>.py`` holds ``RUNNERS``: a function per kind that takes a :class:`Case`,
builds our implementation and returns outputs by name; and ``NOT_REPRODUCED``: {(kind, output): reason}.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

DATA = Path(__file__).parent / "data"


class Masked(NamedTuple):
    """An output with entries the file's notes call meaningless; ``where`` is True on the entries to compare."""

    value: Tensor
    where: Tensor


@dataclass(frozen=True)
class Case:
    """What a runner may see: everything but the expected values."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    wanted: tuple[str, ...]


@dataclass(frozen=True)
class GoldenFile:
    path: Path
    family: str
    kind: str
    rtol: float
    atol: float
    case: Case
    outputs: dict[str, Tensor]


def load(path: Path) -> GoldenFile:
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "inputs": {}, "outputs": {}}
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
        for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
            group, _, name = key.partition(".")
            parts[group][name] = file.get_tensor(key)
    case = Case(json.loads(meta["config"]), parts["weights"], parts["inputs"], tuple(parts["outputs"]))
    return GoldenFile(path, meta["family"], meta["kind"], float(meta["rtol"]), float(meta["atol"]), case, parts["outputs"])


def check(golden: GoldenFile) -> list[tuple[str, str]]:
    """Run and compare one file. Returns the outputs declared as not reproduced, with reasons; raises on any difference."""
    module = f"tests.golden.{golden.family}"
    if importlib.util.find_spec(module) is None:
        raise AssertionError(f"no runners for the family '{golden.family}': tests/golden/{golden.family}.py does not exist")
    family = importlib.import_module(module)
    if golden.kind not in family.RUNNERS:
        raise AssertionError(f"tests/golden/{golden.family}.py has no runner for the kind '{golden.kind}'")
    results = family.RUNNERS[golden.kind](golden.case)
    declared = getattr(family, "NOT_REPRODUCED", {})
    left_out, problems = [], []
    for name, expected in golden.outputs.items():
        if (golden.kind, name) in declared:
            left_out.append((name, declared[golden.kind, name]))
        elif name not in results:
            problems.append(f"{name}: missing")
        else:
            problems += compare(name, results[name], expected, golden.rtol, golden.atol)
    if problems:
        raise AssertionError("\n".join([f"{golden.path.name}:", *problems]))
    return left_out


def compare(name: str, actual: Any, expected: Tensor, rtol: float, atol: float) -> list[str]:
    """Differences in words; empty when equal within tolerance. NaN equals NaN; integers are exact unless atol >= 1."""
    where = None
    if isinstance(actual, Masked):
        actual, where = actual
    actual = torch.as_tensor(actual).detach().cpu()
    if actual.shape != expected.shape:
        return [f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"]
    if where is not None:
        actual, expected = actual[where], expected[where]
    if not expected.is_floating_point() and atol < 1:
        wrong = int((actual != expected).sum())
        return [f"{name}: {wrong} of {expected.numel()} integers differ"] if wrong else []
    a, e = actual.double(), expected.double()
    close = torch.isclose(a, e, rtol=rtol, atol=atol, equal_nan=True)
    if bool(close.all()):
        return []
    gap = (a - e).abs()
    return [f"{name}: {int((~close).sum())} of {close.numel()} differ, by up to {float(gap[~close].max()):.3g}"]
