"""Finds the reference files and counts what is deliberately not reproduced."""

from pathlib import Path

import pytest

from tests.golden import harness

_LEFT_OUT: list[str] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("golden_dir") or harness.DATA)
        family = metafunc.config.getoption("family")
        files = sorted(folder.glob(f"{family or '*'}/*.safetensors"))
        if not files:
            raise pytest.UsageError(f"no golden files {family or '*'}/*.safetensors in {folder}")
        metafunc.parametrize("golden_file", files, ids=[f"{f.parent.name}/{f.stem}" for f in files])


@pytest.fixture
def record_left_out():
    def record(file: Path, left_out: list[tuple[str, str]]) -> None:
        _LEFT_OUT.extend(f"{file.parent.name}/{file.stem}: {name} ({reason})" for name, reason in left_out)

    return record


def pytest_terminal_summary(terminalreporter) -> None:
    if _LEFT_OUT:
        terminalreporter.write_line(f"golden outputs deliberately not reproduced: {len(_LEFT_OUT)}")
        for line in _LEFT_OUT:
            terminalreporter.write_line(f"  {line}")
