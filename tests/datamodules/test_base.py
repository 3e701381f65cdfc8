"""Resume with a real trainer, and the one mechanism for bad samples."""

import json
import os

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import Dataset

from datamodules.base import BaseDataModule, suitable_workers
from models.batch import INDEX, SKIPPED, Skipped
from models.errors import UserError


class Rows(Dataset):
    """Gives back what it is asked for."""

    def __init__(self, size: int, bad: tuple[int, ...] = ()):
        self.size, self.bad = size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, request) -> dict:
        skipped = [Skipped(r, f"key{r}", "corrupt image: test") for r in request.rows.tolist() if r in self.bad]
        return {INDEX: torch.tensor([r for r in request.rows.tolist() if r not in self.bad]), SKIPPED: skipped}


class Data(BaseDataModule):
    def __init__(self, size: int = 22, bad: tuple[int, ...] = (), batch_size: int = 4, **kwargs):
        super().__init__(seed=5, **{"num_workers": 0, **kwargs})
        self.splits = {"train": Rows(size, bad), "val": Rows(6)}
        self.batch_size = batch_size

    def train_dataloader(self):
        return self.train_loader(self.splits["train"], self.batch_size)

    def val_dataloader(self):
        return self.evaluation_loader(self.splits["val"], 4)


class Module(pl.LightningModule):
    """Notes the rows of every step; stops with an error before the step ``fail_at``."""

    def __init__(self, fail_at: int = -1):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.fail_at = fail_at
        self.seen: list[tuple[int, list[int]]] = []

    def training_step(self, batch, batch_idx):
        assert SKIPPED not in batch
        if self.global_step == self.fail_at:
            raise KeyboardInterrupt
        self.seen.append((self.current_epoch, batch[INDEX].tolist()))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAt(pl.Callback):
    """Writes checkpoints in one hook, the way ModelCheckpoint does in each of them."""

    def __init__(self, hook: str, step: int, path):
        self.step, self.path = step, path
        setattr(self, hook, lambda trainer, *args: self.save(trainer))

    def save(self, trainer) -> None:
        if trainer.global_step == self.step and not trainer.sanity_checking and not self.path.exists():
            trainer.save_checkpoint(self.path)


def fit(tmp_path, module, data, callbacks=(), resume=None, epochs=3, **kwargs):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), default_root_dir=tmp_path, use_distributed_sampler=False,
        **{"num_sanity_val_steps": 0, **kwargs},
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    return trainer


# 22 samples in batches of 4: five steps an epoch
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("hook", "step"),
    [
        ("on_train_batch_end", 1), ("on_train_batch_end", 3), ("on_train_batch_end", 7), ("on_train_batch_end", 5),
        ("on_train_batch_end", 10), ("on_validation_end", 5), ("on_validation_end", 8), ("on_train_epoch_end", 5),
        ("on_train_epoch_end", 10),
    ],
)  # fmt: skip
def test_resuming_trains_on_exactly_what_is_left(tmp_path, workers, hook, step):
    options = {"val_check_interval": 3} if (hook, step) == ("on_validation_end", 8) else {}
    whole = Module()
    path = tmp_path / "saved.ckpt"
    fit(tmp_path, whole, Data(num_workers=workers), [SaveAt(hook, step, path)], **options)
    assert len(whole.seen) == 15 and path.exists()
    resumed = Module()
    fit(tmp_path, resumed, Data(num_workers=workers), resume=path, **options)
    assert resumed.seen == whole.seen[step:]


def test_interrupted_twice_in_one_epoch(tmp_path):
    whole = Module()
    fit(tmp_path, whole, Data(num_workers=2))
    parts = []
    resume = None
    for attempt, stop in enumerate((7, 9, 15)):
        path = tmp_path / f"{attempt}.ckpt"
        part = Module()
        fit(
            tmp_path, part, Data(num_workers=2), [SaveAt("on_train_batch_end", stop, path)],
            resume=resume, epochs=-1, max_steps=stop,
        )  # fmt: skip
        parts += part.seen
        resume = path
    assert [rows for _, rows in parts] == [rows for _, rows in whole.seen]


def test_an_exception_inside_a_step_leaves_that_batch_to_be_trained(tmp_path):
    whole = Module()
    fit(tmp_path, whole, Data())
    path = tmp_path / "saved.ckpt"

    class SaveOnException(pl.Callback):
        def on_exception(self, trainer, module, exception):
            trainer.save_checkpoint(path)

    failing = Module(fail_at=7)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(tmp_path, failing, Data(), [SaveOnException()])
    resumed = Module()
    fit(tmp_path, resumed, Data(), resume=path)
    assert failing.seen + resumed.seen == whole.seen


def test_limited_epochs_resume_too(tmp_path):
    path = tmp_path / "saved.ckpt"
    whole = Module()
    fit(tmp_path, whole, Data(), [SaveAt("on_train_batch_end", 5, path)], limit_train_batches=3)
    resumed = Module()
    fit(tmp_path, resumed, Data(), resume=path, limit_train_batches=3)
    assert len(whole.seen) == 9 and resumed.seen == whole.seen[5:]


def test_a_position_among_other_batches_is_refused(tmp_path):
    path = tmp_path / "saved.ckpt"
    fit(tmp_path, Module(), Data(), [SaveAt("on_train_batch_end", 3, path)], epochs=1)
    with pytest.raises(UserError, match="batches of 4; now there are 22 samples in batches of 8"):
        fit(tmp_path, Module(), Data(batch_size=8), resume=path)


def test_overfitting_repeats_the_first_batches(tmp_path):
    module = Module()
    fit(tmp_path, module, Data(), overfit_batches=2)
    assert [rows for _, rows in module.seen] == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3


def test_skips_found_by_workers_are_counted_once(tmp_path):
    data = Data(bad=(3, 11), num_workers=2)
    module = Module()
    fit(tmp_path, module, data)
    report = data.skip_report()
    assert report["total"] == 2 and report["reasons"] == {"corrupt image": 2}
    assert {entry["key"] for entry in report["splits"]["train"]["first"]} == {"key3", "key11"}
    assert json.loads(json.dumps(report)) == report


def test_skips_are_bounded():
    data = Data(size=400)
    bad = [Skipped(i, f"key{i}", f"no caption: in {i}.tar") for i in range(21)]
    data.report_skipped("train", bad[:20])  # exactly 5 %
    with pytest.raises(UserError, match=r"(?s)21 of 400 .*'train'.*21 no caption.*max_skipped=0.05.*key0: no caption"):
        data.report_skipped("train", bad[20:])
    small = Data(size=12)
    small.report_skipped("train", bad[:10])  # ten are always allowed
    with pytest.raises(UserError):
        small.report_skipped("train", bad[10:11])
    with pytest.raises(UserError, match="share of the samples"):
        Data(max_skipped=2)


def test_all_samples_bad_is_an_error_however_few():
    with pytest.raises(UserError, match="3 of 3"):
        Data(size=3).report_skipped("train", [Skipped(i, str(i), "corrupt image: x") for i in range(3)])


def test_ranks_of_one_job_share_each_batch(monkeypatch):
    seen = []
    for rank in range(2):
        data = Data(batch_size=2)
        monkeypatch.setattr(data, "_rank", lambda rank=rank: rank)
        monkeypatch.setattr(data, "_world_size", lambda: 2)
        seen.append([batch[INDEX].tolist() for batch in data.train_dataloader()])
    whole = [batch[INDEX].tolist() for batch in Data(batch_size=4).train_dataloader()]
    assert [one + two for one, two in zip(*seen, strict=True)] == whole
    assert Data(batch_size=4).steps_per_epoch == 5


def test_a_split_smaller_than_a_batch_is_refused_with_the_numbers():
    data = BaseDataModule()
    with pytest.raises(UserError, match="8 samples, fewer than a batch of 32"):
        data.train_loader(range(8), 32)
    assert len(data.train_loader(range(8), 32, drop_last=False)) == 1


def test_data_is_simulated_where_the_root_holds_none(tmp_path):
    data = BaseDataModule()
    assert not data.simulated
    data.root, data.simulate = str(tmp_path), lambda root: tmp_path
    assert data.simulated
    data.holds_data = lambda root: True
    assert not data.simulated


def test_sizes_of_a_simulated_set_mean_nothing_beside_other_data(tmp_path):
    """``debug=tiny/...`` leaves them there."""
    data = BaseDataModule()
    data.root, data.simulate = str(tmp_path), {"train": 24}
    assert not data.simulated and data.folder() == tmp_path


@pytest.mark.parametrize(
    ("cores", "processes", "on_gpu", "reads_arrays", "workers"),
    [
        (2, 1, False, False, 1), (1, 1, False, False, 0), (64, 1, False, False, 8), (64, 1, False, True, 0),
        (16, 1, True, False, 15), (16, 8, True, False, 1), (128, 2, True, False, 16), (16, 1, True, True, 4),
        (1, 4, True, True, 0),
    ],
)  # fmt: skip
def test_workers_follow_cores_device_and_ranks(cores, processes, on_gpu, reads_arrays, workers):
    assert suitable_workers(cores, processes, on_gpu, reads_arrays) == workers


def test_automatic_workers_read_what_a_given_number_reads():
    automatic = Data(num_workers="auto")
    assert automatic.workers() == suitable_workers(len(os.sched_getaffinity(0)), 1, torch.cuda.is_available(), False)
    assert Data(num_workers=3).workers() == 3
