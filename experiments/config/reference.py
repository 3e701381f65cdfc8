"""``conf/README.md``: every group and option with its first comment. ``python -m experiments.config.reference`` writes it."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from experiments.config.validation import CONF

PAGE = CONF / "README.md"
HEAD = """# Configuration groups

Written by `make docs` from the comments of the files. Choose an option with `group=option`, change any argument of its
constructor with `group.argument=value`. Files whose name begins with `_` are bases that options inherit. Recipes
(`experiment=`) are listed by `make list`.
"""


def page() -> str:
    """The text of the page."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(CONF.rglob("*.yaml")):
        path = file.relative_to(CONF)
        if len(path.parts) > 1 and path.parts[0] != "experiment" and not path.name.startswith("_"):
            groups[path.parts[0] if path.parts[0] != "encoder" else "/".join(path.parts[:2])].append(file)
    lines = [HEAD]
    for group, files in groups.items():
        lines += [f"## {group}", "", "| option | what it is |", "|---|---|"]
        lines += [f"| `{file.relative_to(CONF / group).with_suffix('')}` | {_comment(file)} |" for file in files]
        lines.append("")
    return "\n".join(lines)


def _comment(file: Path) -> str:
    """The comment lines at the top of a file, on one line; without one, the target."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line.lstrip("# "))
    if not lines:
        target = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("_target_")]
        return f"`{target[0].split(':')[1].strip()}`" if target else ""
    return " ".join(lines).replace("|", "\\|")


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
