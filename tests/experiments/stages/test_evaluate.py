"""The stage ``evaluate`` of data without a held-out split, and of simulated data."""

import pytest
from omegaconf import OmegaConf

from experiments.run.directory import Run
from experiments.stages.evaluate import evaluate
from tests.experiments.run import toy


class SimulatedData(toy.ToyData):
    def setup(self, stage=None):
        super().setup()
        self.simulate = lambda root: root


@pytest.fixture
def run(tmp_path):
    run = Run(OmegaConf.create({"datamodule": {"_target_": f"{toy.__name__}.ToyData", "val": 0}}), tmp_path, [])
    run.record = {"experiment": "toy", "notes": [], "stages": {}}
    return run


def test_without_held_out_splits_there_is_a_note_and_no_metric(run):
    facts = evaluate(run)
    assert facts["metrics"] == {} and facts["split"] is None
    assert run.notes == ["NOT EVALUATED: the data has neither a test nor a val split."]


def test_simulated_data_is_named(run):
    run.cfg.datamodule._target_ = f"{__name__}.SimulatedData"
    evaluate(run)
    assert run.notes[0].startswith("SIMULATED DATA")
