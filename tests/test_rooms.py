"""The generic rooms name no family and no method: whoever adds a family edits none of them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAMILIES = {path.name for path in (ROOT / "models").iterdir() if (path / "README.md").is_file()} | {"alignment", "structure_"}
FAMILIES |= {path.stem for path in (ROOT / "lightning_modules").glob("*.py")} - {"__init__", "base", "held_out"}
FAMILIES |= {path.name for path in (ROOT / "conf" / "module").iterdir()}
WORDS = {"bev", "dgm4", "drive_in", *FAMILIES - {"structure"}}
GENERIC = [
    *(path for room in ("config", "run", "stages", "sweeps") for path in (ROOT / "experiments" / room).glob("*.py")),
    ROOT / "experiments" / "runner.py",
    ROOT / "experiments" / "evaluation" / "base.py",
    ROOT / "experiments" / "prediction" / "base.py",
    ROOT / "lightning_modules" / "base.py",
    ROOT / "datamodules" / "base.py",
    ROOT / "models" / "batch.py",
    ROOT / "conf" / "config.yaml",
    ROOT / "conf" / "pipeline" / "train.yaml",
    ROOT / "run.py",
    ROOT / "tests" / "experiments" / "tiny.py",
    ROOT / "tests" / "experiments" / "test_every_experiment.py",
]


@pytest.mark.parametrize("path", GENERIC, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_generic_rooms_name_no_family(path):
    assert len(WORDS) > 8
    pattern = re.compile("|".join(rf"(?<![a-z]){re.escape(word)}" for word in sorted(WORDS)))
    lines = [f"{n}: {line.strip()}" for n, line in enumerate(path.read_text().splitlines(), 1) if pattern.search(line.lower())]
    assert not lines, "\n".join(lines)
