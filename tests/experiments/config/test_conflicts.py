"""A module and a datamodule that cannot work together are named before training starts."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from datamodules.audio_visual import AudioVisualDataModule
from datamodules.dgm4 import DGM4DataModule
from datamodules.driving import BevDataModule
from datamodules.video_text_rows import provided_keys
from experiments.config.conflicts import batch_key_conflicts
from lightning_modules.all_in_one import NEEDS
from models.all_in_one.batch import FALSE_ROWS
from models.batch import INDEX, VIDEO
from models.errors import UserError
from tests.lightning_modules.small import MODULES, built, some_rows

PROVIDERS = {"avgn": AudioVisualDataModule, "bev_fusion": BevDataModule, "hammer": DGM4DataModule}


@pytest.mark.parametrize("name", PROVIDERS)
def test_each_kind_of_data_serves_its_family_alone(name):
    module = built(name)
    assert batch_key_conflicts(module, PROVIDERS[name]) == []
    for other in PROVIDERS.keys() - {name}:
        (problem,) = batch_key_conflicts(module, PROVIDERS[other])
        assert type(module).__name__ in problem and "needs" in problem


# Keys of held-out batches alone, whose images are whole.
HELD_OUT = {"rad_dino": ("image", "findings"), "radiograph_findings": ("image",)}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_needs_what_its_step_reads(name):
    """With the keys that it says it needs a module takes a step; without one of them it cannot."""
    module, batch = built(name), some_rows(MODULES[name].rows(4), np.arange(4))
    batch = {key: value for key, value in batch.items() if key in {INDEX, FALSE_ROWS, *module.needs, *HELD_OUT.get(name, ())}}
    module.shared_step(batch, "val")
    for key in module.needs:
        with pytest.raises((AttributeError, KeyError, TypeError, UserError)):
            module.shared_step({k: v for k, v in batch.items() if k != key}, "val")


@pytest.mark.parametrize("task", NEEDS)
def test_clips_with_texts_provide_what_each_task_needs(task):
    assert {VIDEO, *NEEDS[task]} <= set(provided_keys([task]))


def test_a_datamodule_that_does_not_say_is_not_checked():
    assert batch_key_conflicts(built("hammer"), SimpleNamespace(provides=())) == []
    assert partial(batch_key_conflicts, built("hammer"))(SimpleNamespace(provides=("image",))) != []
