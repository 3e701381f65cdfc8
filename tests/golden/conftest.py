"""Finds the reference files and counts what is deliberately not reproduced."""

from pathlib import Path

import pytest

from tests.golden import harness

LEFT_OUT = "left out"  # property of a test, which travels from the workers


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("golden_dir") or harness.DATA)
        family = metafunc.config.getoption("family")
        files = sorted(folder.glob(f"{family or '*'}/*.safetensors"))
        if not files:
            raise pytest.UsageError(f"no golden files {family or '*'}/*.safetensors in {folder}")
        metafunc.parametrize("golden_file", files, ids=[f"{f.parent.name}/{f.stem}" for f in files])


@pytest.fixture
def record_left_out(record_property):
    def record(file: Path, left_out: list[tuple[str, str]]) -> None:
        for name, reason in left_out:
            record_property(LEFT_OUT, f"{file.parent.name}/{file.stem}: {name} ({reason})")

    return record


def pytest_terminal_summary(terminalreporter) -> None:
    calls = [
        report for reports in terminalreporter.stats.values() for report in reports if getattr(report, "when", "") == "call"
    ]
    lines = sorted(text for report in calls for name, text in report.user_properties if name == LEFT_OUT)
    if lines:
        terminalreporter.write_line(f"golden outputs deliberately not reproduced: {len(lines)}")
        for line in lines:
            terminalreporter.write_line(f"  {line}")
