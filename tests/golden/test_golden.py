"""One test per reference file: ``pytest tests/golden [--golden-dir DIR] [--family NAME]``."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.golden import harness


def test_output_matches_official(golden_file: Path, record_left_out):
    record_left_out(golden_file, harness.check(harness.load(golden_file)))


def test_harness_sees_differences():
    expected = torch.tensor([1.0, float("nan"), 3.0])
    assert harness.compare("x", expected.clone(), expected, 1e-6, 0) == []
    assert harness.compare("x", expected + 1e-3, expected, 1e-6, 0)
    assert harness.compare("x", expected[:2], expected, 1e-6, 0)
    assert harness.compare("x", torch.tensor([1, 2]), torch.tensor([1, 3]), 1, 0.5)
    masked = harness.Masked(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, False, False]))
    assert harness.compare("x", masked, expected, 1e-6, 0) == []


def any_file() -> harness.GoldenFile:
    return harness.load(sorted(harness.DATA.rglob("sail/metric_winoground.safetensors"))[0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "no_such_kind"}, "no runner"),
        ({"family": "no_such_family"}, "no_such_family.py does not exist"),
        ({"outputs": {"no_such_output": torch.ones(1)}}, "no_such_output: missing"),
        ({"outputs": {"scores": torch.ones(3, dtype=torch.float64)}}, "scores: 3 of 3 differ"),
    ],
)
def test_what_must_fail_fails(change, message):
    with pytest.raises(AssertionError, match=message):
        harness.check(replace(any_file(), **change))


def test_declared_outputs_are_counted_not_compared(monkeypatch):
    golden = any_file()
    wrong = replace(golden, outputs=golden.outputs | {"scores": torch.zeros(3)})
    monkeypatch.setattr("tests.golden.sail.NOT_REPRODUCED", {("metric_winoground", "scores"): "why"}, raising=False)
    assert harness.check(wrong) == [("scores", "why")]
