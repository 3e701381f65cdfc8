"""A method, data and a run small enough to train in a second, through the real stage ``fit``.

As a command (``python -m tests.experiments.run.toy FOLDER key=value ...``) it is one run with its signals, as run.py makes it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from unittest import mock

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import Dataset

from datamodules.base import BaseDataModule
from experiments.run import directory, interruption
from experiments.run.callbacks import Checkpoints
from experiments.stages.fit import fit
from lightning_modules.base import BaseModule, StepOutput
from models.batch import INDEX
from models.io import read_tensors

STEPS, VALIDATIONS = 6, 3  # batches of an epoch and of a validation, in one process


class ToyModule(BaseModule):
    def __init__(self):
        super().__init__(
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.05),
            scheduler=lambda total_steps, *_: lambda step: 1 - step / (total_steps + 1),
        )
        self.net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 1))

    def shared_step(self, batch, split):
        noise = torch.rand(len(batch["x"]), 1)  # training and validation both draw
        loss = ((self.net(batch["x"]) - batch["x"].sum(1, keepdim=True) + 0.01 * noise) ** 2).mean()
        return StepOutput({"mse": loss})


class Rows(Dataset):
    def __init__(self, size):
        self.x = torch.randn(size, 3, generator=torch.Generator().manual_seed(size))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, request):
        return {"x": self.x[request.rows], INDEX: torch.as_tensor(request.rows)}


class ToyData(BaseDataModule):
    def __init__(self, val=12, num_workers=0, train=24):
        super().__init__(num_workers=num_workers)
        self.val, self.train = val, train

    def setup(self, stage=None):
        self.splits = {"train": Rows(self.train)} | ({"val": Rows(self.val)} if self.val else {})

    def train_dataloader(self):
        return self.train_loader(self.splits["train"], 4)

    def evaluation_dataloader(self, split):
        return self.evaluation_loader(self.splits[split], 4)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class At(pl.Callback):
    """Calls ``action`` in a hook when it is called for the ``count``-th time (counted from 0)."""

    def __init__(self, hook, count, action):
        self.count = count

        def called(*args, **kwargs):
            if self.count == 0:
                action()
            self.count -= 1

        setattr(self, hook, called)


class Slow(pl.Callback):
    """Leaves time for a signal in every training and validation step; says that training has begun, and the first loss."""

    def __init__(self, seconds):
        self.seconds = seconds

    def _wait(self, trainer):
        Path(trainer.default_root_dir, f"started-{trainer.global_rank}").touch()
        time.sleep(self.seconds)

    def on_train_batch_start(self, trainer, *args):
        self._wait(trainer)

    def on_validation_batch_start(self, trainer, *args):
        self._wait(trainer)

    def on_train_batch_end(self, trainer, module, outputs, *args):
        loss = Path(trainer.default_root_dir, f"loss-{trainer.global_rank}")
        if not loss.exists():
            loss.write_text(repr(float(outputs["loss"])))


def config(**trainer) -> DictConfig:
    target = "tests.experiments.run.toy"
    return OmegaConf.create(
        {
            "seed": 1,
            "checkpoint": None,
            "module": {"_target_": f"{target}.ToyModule"},
            "datamodule": {"_target_": f"{target}.ToyData"},
            "logger": {},
            "trainer": {
                "_target_": "pytorch_lightning.Trainer", "accelerator": "cpu", "devices": 1, "max_epochs": 4,
                "log_every_n_steps": 1, "num_sanity_val_steps": 0, "use_distributed_sampler": False, **trainer,
            },
            "callbacks": {
                "checkpoints": {
                    "_target_": "experiments.run.callbacks.Checkpoints", "monitor": "val/loss", "mode": "min",
                    "every_n_minutes": 1000,
                },
                "random_steps": {"_target_": "experiments.run.callbacks.RandomSteps", "seed": 1},
            },
        }
    )  # fmt: skip


def train(folder: Path, *callbacks: pl.Callback, cfg: DictConfig | None = None, minutes: float = 1000) -> directory.Run:
    """One start of the run in ``folder``; it goes on from the run's checkpoints."""
    cfg = cfg or config()
    cfg.callbacks.checkpoints.every_n_minutes = minutes
    Path(folder).mkdir(parents=True, exist_ok=True)
    run = directory.Run(cfg, Path(folder), [])
    run.record = run.record or {
        "experiment": "toy", "identity": "0", "created": "0", "status": "running", "notes": [], "stages": {}, "id": "0",
    }  # fmt: skip
    init = pl.Trainer.__init__

    def with_ours(trainer, **settings):  # behind those that ``fit`` builds
        init(trainer, **{**settings, "callbacks": [*settings["callbacks"], *callbacks]})

    with interruption.listening(), mock.patch.object(pl.Trainer, "__init__", with_ours):
        fit(run)
    return run


def state(folder: Path) -> dict:
    """All that must be equal between a run that was stopped and one that was not."""
    files = {}
    for path in sorted(Path(folder, "checkpoints").iterdir()):
        name = path.name
        files[name] = read_tensors(path / "weights.safetensors")
        trainer = torch.load(path / "trainer.pt", weights_only=True)
        files[f"{name}.optimizer"] = trainer["optimizer_states"]
        files[f"{name}.schedulers"] = trainer["lr_schedulers"]
        files[f"{name}.step"] = trainer["global_step"], trainer["callbacks"][Checkpoints().state_key]
    return {**files, "metrics": (Path(folder) / "metrics.csv").read_text()}


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def assert_equal_runs(left: Path, right: Path) -> None:
    left, right = state(left), state(right)
    for name in left:
        assert same(left[name], right[name]), f"{name}: {left[name]} != {right[name]}"


def main() -> None:
    folder, *arguments = sys.argv[1:]
    options = dict(argument.split("=") for argument in arguments)
    cfg = config(devices=int(options.get("devices", 1)), max_epochs=int(options.get("epochs", 4)))
    if cfg.trainer.devices > 1:
        cfg.trainer.strategy = "ddp"
    cfg.datamodule.num_workers = int(options.get("workers", 0))
    torch.set_num_threads(1)
    code = 0
    try:
        train(Path(folder), Slow(float(options.get("sleep", 0))), cfg=cfg)
    except interruption.Interrupted as stop:
        code = stop.exit_code
    Path(folder, f"ended-{os.environ.get('LOCAL_RANK', 0)}").write_text(str(code))
    sys.exit(code)


if __name__ == "__main__":
    main()
