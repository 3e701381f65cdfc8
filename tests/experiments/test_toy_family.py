"""A family of one's own, in a package and a configuration folder beside the project: no file of the project is edited."""

import math
from pathlib import Path

from tests.experiments.launch import launch_cold, result, runs

CODE = """
import numpy as np
import torch
from torch import nn

from datamodules.base import BaseDataModule
from experiments.evaluation.base import SuiteResult
from lightning_modules.base import BaseModule, StepOutput
from models.batch import INDEX

POINTS, TARGETS = "toy_points", "toy_targets"


class Line(torch.utils.data.Dataset):
    fingerprint = "a line"

    def __len__(self):
        return 24

    def __getitem__(self, request):
        points = torch.from_numpy(request.rows).float()[:, None] / 24
        return {INDEX: torch.from_numpy(request.rows), POINTS: points, TARGETS: 2 * points + 1}


class LineData(BaseDataModule):
    provides = (INDEX, POINTS, TARGETS)

    def setup(self, stage=None):
        self.splits = {name: Line() for name in ("train", "val", "test")}

    def train_dataloader(self):
        return self.train_loader(self.splits["train"], 8)

    def evaluation_dataloader(self, split):
        return self.evaluation_loader(self.splits[split], 8)


def line_error(rows):
    return {"error": (rows["predicted"] - rows["target"]).abs().mean().item()}


class LineModule(BaseModule):
    needs = (POINTS, TARGETS)

    def __init__(self, width: int = 1, optimizer=None, scheduler=None):
        super().__init__(optimizer, scheduler)
        self.model = nn.Linear(width, 1)

    def shared_step(self, batch, split):
        predicted = self.model(batch[POINTS])
        rows = {INDEX: batch[INDEX], "predicted": predicted.detach(), "target": batch[TARGETS]}
        return StepOutput({"square": (predicted - batch[TARGETS]).square().mean()}, outputs=rows)

    def validation_metrics(self, rows):
        return line_error(rows)


def error(split):
    return SuiteResult({"error": line_error(split.rows())["error"]}, {"zero": {"error": 2.0}})
"""
CONF = {
    "experiment/toy_line": """
        # @package _global_
        defaults:
          - override /module: toy/base
          - override /datamodule: toy/line
          - override /evaluation: toy/error
        trainer: {max_epochs: 3, log_every_n_steps: 1}
        optimizer: {lr: 0.1}
        trusted_packages: [toy_family]
    """,
    "module/toy/base": """
        _target_: toy_family.LineModule
        optimizer: ${optimizer}
        scheduler: ${scheduler}
    """,
    "datamodule/toy/line": "_target_: toy_family.LineData\n",
    "evaluation/toy/error": "error:\n  _target_: toy_family.error\n  _partial_: true\n",
}


def test_a_family_is_added_beside_the_project(tmp_path, monkeypatch):
    (tmp_path / "toy_family.py").write_text(CODE)
    for name, text in CONF.items():
        file = tmp_path / "conf" / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = text.strip("\n").splitlines()
        indent = len(lines[0]) - len(lines[0].lstrip())
        file.write_text("\n".join(line[indent:] for line in lines).rstrip() + "\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = launch_cold(tmp_path, "--config-dir", str(Path(tmp_path, "conf")), "experiment=toy_line", "threads=1")
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "toy_line")
    assert math.isfinite(result(run)["metrics"]["test/error"])
    assert "test/error" in done.stdout and "zero" in done.stdout
    assert "val/error" in (run / "metrics.csv").read_text()
