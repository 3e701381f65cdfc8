"""``make list``: every recipe with its one-line description, read from the YAML files."""

import contextlib
from pathlib import Path

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "conf" / "experiment"


def main() -> None:
    for file in sorted(FOLDER.rglob("*.yaml"), key=lambda p: (len(p.relative_to(FOLDER).parts), p)):
        name = file.relative_to(FOLDER).with_suffix("").as_posix()
        description = (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("description", "")
        print(f"{name:32} {description}")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # of `| head`
        main()
