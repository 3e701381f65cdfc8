"""``sweep.html``: the jobs of a sweep in one file that any browser shows without network."""

from __future__ import annotations

import csv
import html
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.run.directory import differences
from experiments.sweeps.table import SEED, Job, label_of
from models.io import atomic_write

POINTS = 200  # of a curve, at most
TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    folder: Path,
    jobs: Sequence[Job],
    rows: Sequence[dict[str, Any]],
    axes: Sequence[str],
    metrics: Sequence[str],
    failed: dict[str, str],
    paired: dict[str, Any] | None = None,
) -> Path:
    """Write the page of a sweep.

    Args:
        folder: the sweep's folder; the page is ``sweep.html`` in it.
        jobs: the finished jobs.
        rows: a row for each setting, as the table has them.
        axes: the overrides in which the jobs differ, without the seed.
        metrics: names of all metrics.
        failed: overrides of each job that failed, with the reason.
        paired: rows of differences and what they are ``against``; null: there are none.
    """
    configs = [_config(Path(job.folder)) for job in jobs]
    content = {
        "title": f"{folder.parent.name}: {folder.name}",
        "summary": f"{len(jobs)} jobs finished, {len(failed)} failed.",
        "axes": list(axes),
        "metrics": list(metrics),
        "rows": rows,
        "paired": paired,
        "curves": _curves(jobs),
        "jobs": [
            {
                "name": Path(job.folder).name,
                "status": "finished",
                "settings": job.settings,
                "metrics": job.metrics,
                "difference": differences(configs[0], config),
            }
            for job, config in zip(jobs, configs, strict=True)
        ]
        + [
            {"name": name, "status": "failed", "reason": reason, "settings": {}, "metrics": {}, "difference": [reason]}
            for name, reason in failed.items()
        ],
    }
    text = json.dumps(_without_nan(content)).replace("<", "\\u003c")  # no text of a job ends the script
    page = TEMPLATE.read_text(encoding="utf-8").replace("<title>sweep", f"<title>{html.escape(folder.name)}")
    with atomic_write(folder / "sweep.html") as temporary:
        temporary.write_text(page.replace("__DATA__", text), encoding="utf-8")
    return folder / "sweep.html"


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    content: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    return {key: value for key, value in content.items() if key not in ("paths", "optimize", "sweep_name")}


def _curves(jobs: Sequence[Job]) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """For each metric of metrics.csv and each setting: step, mean and standard deviation over seeds."""
    values: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for job in jobs:
        file = Path(job.folder) / "metrics.csv"
        if not file.is_file():
            continue
        label = label_of({key: value for key, value in job.settings.items() if key != SEED})
        with file.open(newline="") as rows:
            for row in csv.DictReader(rows):
                if row["metric"].startswith("val/") or row["metric"] == "train/loss":
                    values[row["metric"]][label][int(row["step"])].append(float(row["value"]))
    curves: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for metric, groups in sorted(values.items()):
        for label, steps in groups.items():
            every = sorted(steps)
            shown = every[:: math.ceil(len(every) / POINTS)]
            points = [(s, statistics.fmean(steps[s]), statistics.stdev(steps[s]) if len(steps[s]) > 1 else 0.0) for s in shown]
            curves.setdefault(metric, {})[label] = [point for point in points if all(map(math.isfinite, point))]
    return curves


def _without_nan(node: Any) -> Any:
    """The same with null in place of what JSON has no number for."""
    if isinstance(node, dict):
        return {key: _without_nan(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_without_nan(item) for item in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node
