"""One test per reference file: ``pytest tests/golden [--golden-dir DIR] [--family NAME]``."""

from pathlib import Path

import pytest

from tests.golden import harness


def test_output_matches_official(golden_file: Path, record_left_out):
    record_left_out(golden_file, harness.check(harness.load(golden_file)))


def test_harness_sees_differences():
    import torch

    expected = torch.tensor([1.0, float("nan"), 3.0])
    assert harness.compare("x", expected.clone(), expected, 1e-6, 0) == []
    assert harness.compare("x", expected + 1e-3, expected, 1e-6, 0)
    assert harness.compare("x", expected[:2], expected, 1e-6, 0)
    assert harness.compare("x", torch.tensor([1, 2]), torch.tensor([1, 3]), 1, 0.5)
    masked = harness.Masked(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, False, False]))
    assert harness.compare("x", masked, expected, 1e-6, 0) == []


def test_unknown_kind_fails(tmp_path):
    source = sorted(harness.DATA.rglob("*.safetensors"))[0]
    golden = harness.load(source)
    unknown = harness.GoldenFile(
        golden.path, golden.family, "no_such_kind", golden.rtol, golden.atol, golden.case, golden.outputs
    )
    with pytest.raises(AssertionError, match="no runner"):
        harness.check(unknown)
