"""The range test sets the rate before the first step and leaves everything else as it was."""

import pytest
import torch

from experiments.run import interruption
from experiments.run.lr_range import LearningRateRangeTest
from tests.experiments.run.toy import At, ToyModule, state, terminate, train


def test_the_rate_is_set_and_kept_on_resume(tmp_path, monkeypatch):
    made = []

    class Warming(torch.nn.Identity):
        warmup_steps = 7

    init = ToyModule.__init__

    def with_warmup(self):
        init(self)
        self.warming = Warming()
        made.append(self)

    monkeypatch.setattr(ToyModule, "__init__", with_warmup)
    with pytest.raises(interruption.Interrupted):
        train(tmp_path, LearningRateRangeTest(iterations=20), At("on_train_batch_start", 2, terminate))
    (rate,) = state(tmp_path)["last.schedulers"][0]["base_lrs"]
    assert rate not in (0.0, 0.05)
    assert made[0].warming.warmup_steps == 7
    train(tmp_path, LearningRateRangeTest(iterations=20))
    assert state(tmp_path)["last.schedulers"][0]["base_lrs"] == [rate]
