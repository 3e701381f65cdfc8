"""What the stage ``fit`` says about a run that is not what its recipe means."""

import pytest
from hydra import initialize_config_dir

from experiments.config.resolvers import register_resolvers
from experiments.config.validation import CONF
from experiments.run.directory import Run
from experiments.stages.fit import _recipe_asks_for_weights
from models.errors import UserError
from tests.experiments.run import toy


@pytest.mark.parametrize(
    ("overrides", "asks"),
    [
        (["experiment=paper/all_in_one/msrvtt_vtc", "checkpoint=null"], True),
        (["experiment=paper/avgn/activitynet_stage2", "checkpoint=null"], True),
        (["experiment=paper/hammer/dgm4", "checkpoint=null"], True),
        (["experiment=paper/avgn/activitynet_stage2"], False),
        (["experiment=avgn_small", "checkpoint=null"], False),
    ],
)
def test_training_from_nothing_against_the_recipe_is_noted(tmp_path, overrides, asks):
    register_resolvers()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert _recipe_asks_for_weights(Run(None, tmp_path, overrides)) == asks


def test_without_a_val_split_nothing_waits_for_validation(tmp_path):
    cfg = toy.config(max_epochs=1)
    cfg.datamodule.val = 0
    cfg.callbacks.early_stopping = {"_target_": "pytorch_lightning.callbacks.EarlyStopping", "monitor": "val/loss"}
    run = toy.train(tmp_path, cfg=cfg)
    assert any("NO VAL SPLIT" in note for note in run.notes)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last"]


def test_a_training_set_smaller_than_a_batch_is_refused(tmp_path):
    cfg = toy.config(max_epochs=1)
    cfg.datamodule.train = 3
    with pytest.raises(UserError, match="3 samples, fewer than a batch of 4"):
        toy.train(tmp_path, cfg=cfg)
