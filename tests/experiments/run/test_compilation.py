"""Networks are compiled in place: what a step calls, with the same names, and with a count of what was compiled again."""

import pytest
import torch
from torch import nn

from experiments.run.compilation import compile_networks, counted
from tests.lightning_modules.small import MODULES, Data, built, trainer


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", MODULES)
def test_parts_and_state_dict(name):
    module = built(name)
    before = module.state_dict().keys()
    compile_networks(module, backend="eager")
    parts = module.compiled_parts()
    assert parts and all(part._compiled_call_impl is not None for part in parts)
    assert module.state_dict().keys() == before
    assert all(type(part).forward is not nn.Module.forward for part in parts)


@pytest.mark.parametrize("name", ["alignment", "all_in_one"])
def test_a_step_is_the_same_and_compilations_are_counted(name, tmp_path):
    losses = []
    for compiled in (False, True):
        module = built(name)
        if compiled:
            compile_networks(module, backend="eager")
        torch.manual_seed(3)
        running = trainer(default_root_dir=tmp_path, max_steps=1, limit_val_batches=0)
        running.fit(module, datamodule=Data(name, 6, 6, 6))
        losses.append(float(running.callback_metrics["train/loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert counted()["compilations"] > 0


def test_another_shape_is_counted_as_compiled_again():
    module = nn.Module()
    module.compiled_parts = lambda: [linear]
    linear = nn.Linear(3, 3)
    compile_networks(module, backend="eager")
    for size in (2, 2, 5):
        linear(torch.ones(size, 3))
    assert counted() == {"compilations": 2, "recompilations": 1}
