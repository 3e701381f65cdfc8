"""What holds for every Lightning module: gradients, held-out rows, metrics, and errors for what is not finite."""

import importlib
import pkgutil
from functools import partial

import pytest
import torch

import lightning_modules
from lightning_modules.base import BaseModule
from models.batch import INDEX
from models.errors import UserError
from tests.lightning_modules.small import MODULES, Data, Rows, built, trainer


def test_no_module_is_left_out():
    classes = set()
    for info in pkgutil.iter_modules(lightning_modules.__path__):
        names = vars(importlib.import_module(f"lightning_modules.{info.name}")).values()
        classes |= {c for c in names if isinstance(c, type) and issubclass(c, BaseModule) and c is not BaseModule}
    assert classes == {type(built(name)) for name in MODULES}


def train_batch(name: str, size: int = 6) -> dict:
    data = Data(name, size, size, size)
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("name", MODULES)
def test_every_trainable_parameter_gets_a_gradient(name, tmp_path):
    """One real training step: plain DDP stops for a parameter without a gradient."""
    module, without = built(name), []
    module.on_after_backward = lambda: without.extend(
        key for key, p in module.named_parameters() if p.requires_grad and p.grad is None
    )
    trainer(default_root_dir=tmp_path, max_steps=1, limit_val_batches=0).fit(module, datamodule=Data(name, 6, 6, 2))
    assert not without


@pytest.mark.parametrize("name", MODULES)
def test_rows_name_their_samples_and_give_the_metrics(name):
    module = built(name).eval()
    batch = Data(name, 6, 6, 6).splits["val"][next(iter(Data(name, 6, 6, 6).val_dataloader().sampler))]
    with torch.inference_mode():
        rows = module.predict_step(batch)
    assert rows[INDEX].tolist() == list(range(6))
    assert all(len(value) == 6 for value in rows.values())
    metrics = module.validation_metrics({key: value.cpu() for key, value in rows.items()})
    assert metrics and all(isinstance(value, float) for value in metrics.values())


@pytest.mark.parametrize("name", MODULES)
def test_weights_that_are_not_finite_stop_validation(name, tmp_path):
    module = built(name)
    with torch.no_grad():
        next(p for p in module.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(UserError, match="weights are not finite"):
        trainer(default_root_dir=tmp_path).validate(module, datamodule=Data(name, 4, 4, 4), verbose=False)


def test_small_data_is_sliced_by_rows():
    rows = Rows(MODULES["hammer"].rows(5))
    batch = rows[next(iter(partial(Data, "hammer", 2, 5, 5)().train_dataloader().sampler))]
    assert len(batch["image"]) == 2
