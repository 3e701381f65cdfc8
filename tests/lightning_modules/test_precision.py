"""Every Lightning module trains and validates in half precision, close to single precision."""

import pytest
import torch

from tests.lightning_modules.small import MODULES, Data, built, trainer


def metrics_of_one_step(name: str, dtype: torch.dtype | None, folder) -> dict[str, float]:
    """What one training step and a validation log; gradients must be finite and weights stay in float32."""
    module, bad = built(name), []
    step = module.shared_step

    def in_half_precision(batch: dict, split: str):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return step(batch, split)

    module.shared_step = in_half_precision
    module.on_after_backward = lambda: bad.extend(
        key for key, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    )
    torch.manual_seed(3)
    running = trainer(default_root_dir=folder, max_steps=1, val_check_interval=1)
    running.fit(module, datamodule=Data(name, 6, 6, 6))
    assert not bad
    assert {value.dtype for value in module.state_dict().values() if value.is_floating_point()} == {torch.float32}
    return {key: float(value) for key, value in running.callback_metrics.items()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.01)])
@pytest.mark.parametrize("name", MODULES)
def test_half_precision_is_close_to_single(name, dtype, tolerance, tmp_path):
    exact, half = (metrics_of_one_step(name, precision, tmp_path) for precision in (None, dtype))
    assert exact.keys() == half.keys() and {"train/loss", "val/loss"} <= exact.keys()
    for key in ("train/loss", "val/loss"):
        assert half[key] == pytest.approx(exact[key], rel=tolerance, abs=tolerance)
    assert half["train/loss"] != exact["train/loss"]  # half precision was there
    assert all(torch.tensor(list(half.values())).isfinite())
