"""Batches of features: the right rows, the right captions, and a training run that resumes exactly."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from datamodules.features.pairs import FeatureDataModule, PairedFeatures
from datamodules.features.store import FeatureStore
from models.alignment.batch import EXTRA_TEXT_FEATURES, IMAGE_FEATURES, TEXT_FEATURES
from models.batch import INDEX
from models.errors import UserError

CAPTIONS = [3, 1, 2, 4, 3, 3, 2, 1, 3, 3, 2, 2]  # of the twelve samples
OFFSETS = np.concatenate([[0], np.cumsum(CAPTIONS)])


@pytest.fixture
def pairs(tmp_path):
    """Image feature of sample i is i; that of its caption j is i + j / 10. Image 4 and a caption of 9 are skipped."""
    images = FeatureStore.create_or_resume(tmp_path / "images", {}, rows=12, dim=3, dtype="float32")
    texts = FeatureStore.create_or_resume(
        tmp_path / "texts", {}, rows=int(OFFSETS[-1]), dim=2, dtype="float32", offsets=OFFSETS
    )
    for i in range(12):
        if i != 4:
            images.write(np.array([i]), torch.full((1, 3), float(i)))
        for j in range(CAPTIONS[i]):
            if (i, j) != (9, 1):
                texts.write(np.array([OFFSETS[i] + j]), torch.full((1, 2), i + j / 10))
    images.skip(4, "k4", "corrupt image: test")
    texts.skip(int(OFFSETS[9]) + 1, "k9", "test")
    images.finish()
    texts.finish()
    return PairedFeatures({"pooled": FeatureStore.open(tmp_path / "images")}, {"pooled": FeatureStore.open(tmp_path / "texts")})


USABLE = [0, 1, 2, 3, 5, 6, 7, 8, 10, 11]


def batches(data, epoch=0):
    data.load_state_dict({**data.state_dict(), "epoch": epoch})
    return list(data.train_dataloader())


def test_skipped_images_and_captions_take_their_sample_out(pairs):
    assert pairs.rows.tolist() == USABLE
    data = FeatureDataModule(pairs, batch_size=5)
    assert sorted(torch.cat([batch[INDEX] for batch in batches(data)]).tolist()) == USABLE
    assert data.facts() == {"vision_dim": 3, "text_dim": 2} and data.steps_per_epoch == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_first_and_next_caption(pairs, workers):
    for batch in batches(FeatureDataModule(pairs, batch_size=4, positives=2, num_workers=workers)):
        index = batch[INDEX]
        assert torch.equal(batch[IMAGE_FEATURES], index[:, None].expand(-1, 3).float())
        assert torch.equal(batch[TEXT_FEATURES], index[:, None].expand(-1, 2).float())
        extra = torch.tensor([i + (0.1 if CAPTIONS[i] > 1 else 0.0) for i in index.tolist()])
        torch.testing.assert_close(batch[EXTRA_TEXT_FEATURES][:, 0], extra)  # a single caption is repeated
        assert index.tolist() == sorted(index.tolist())


def test_one_positive_has_no_extra_text(pairs):
    assert all(EXTRA_TEXT_FEATURES not in batch for batch in batches(FeatureDataModule(pairs, positives=1, batch_size=4)))


def test_random_extra_captions_are_never_the_first_and_pure_in_the_epoch(pairs):
    def extras(epoch, batch_size):
        data = FeatureDataModule(pairs, batch_size=batch_size, extra_caption="random", seed=3)
        found = {}
        for batch in batches(data, epoch):
            rest = (batch[EXTRA_TEXT_FEATURES][:, 0] - batch[INDEX]).mul(10).round().int().tolist()
            found |= dict(zip(batch[INDEX].tolist(), rest, strict=True))
        return found

    seen = {i: set() for i in USABLE}
    for epoch in range(40):
        for i, j in extras(epoch, 5).items():
            seen[i].add(j)
    assert seen == {i: set(range(1, CAPTIONS[i])) or {0} for i in USABLE}
    assert extras(7, 5) == extras(7, 2)


@pytest.mark.parametrize("extra_caption", ["next", "random"])
def test_random_captions_are_all_of_them_and_the_extra_one_is_another(pairs, extra_caption):
    data = FeatureDataModule(pairs, batch_size=5, caption="random", extra_caption=extra_caption)
    seen = {i: set() for i in USABLE}
    for epoch in range(60):
        for batch in batches(data, epoch):
            both = torch.stack([batch[TEXT_FEATURES][:, 0], batch[EXTRA_TEXT_FEATURES][:, 0]]) - batch[INDEX]
            for i, *chosen in zip(batch[INDEX].tolist(), *both.mul(10).round().int().tolist(), strict=True):
                seen[i].add(tuple(chosen))
    for i, chosen in seen.items():
        assert {text for text, _ in chosen} == set(range(CAPTIONS[i]))
        assert CAPTIONS[i] == 1 or all(text != extra for text, extra in chosen)


def test_a_batch_larger_than_the_data_is_all_of_it(pairs):
    data = FeatureDataModule(pairs, batch_size=4096)
    (batch,) = batches(data)
    assert sorted(batch[INDEX].tolist()) == USABLE
    assert "4096" in data.notes[0] and "10 training pairs" in data.notes[0]


def test_validation_sees_every_pair_in_order(pairs):
    data = FeatureDataModule(pairs, val=pairs, batch_size=4)
    assert torch.cat([batch[INDEX] for batch in data.val_dataloader()]).tolist() == USABLE
    assert FeatureDataModule(pairs, batch_size=4).val_dataloader() == []


def test_bad_arguments(pairs, tmp_path):
    with pytest.raises(UserError, match="batch_size=0"):
        FeatureDataModule(pairs, batch_size=0)
    with pytest.raises(UserError, match="not of the same samples"):
        PairedFeatures({"pooled": pairs.texts}, {"pooled": pairs.texts})
    empty = FeatureStore.create_or_resume(tmp_path / "empty", {}, rows=12, dim=3)
    for row in range(12):
        empty.skip(row)
    with pytest.raises(UserError, match="none of the 12 samples"):
        PairedFeatures({"pooled": empty}, {"pooled": pairs.texts})


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append([batch[INDEX].tolist(), batch[EXTRA_TEXT_FEATURES].tolist()])
        return (self.layer(batch[IMAGE_FEATURES]) - batch[TEXT_FEATURES]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def test_a_resumed_run_sees_the_same_pairs_and_captions(pairs, tmp_path):
    def fit(max_steps, resume=None):
        module = Module()
        trainer = pl.Trainer(
            max_steps=max_steps, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        )  # fmt: skip
        data = FeatureDataModule(pairs, batch_size=3, extra_caption="random")
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        trainer.save_checkpoint(tmp_path / f"{max_steps}.ckpt")
        return module.seen

    whole = fit(8)
    assert fit(4) + fit(8, resume=tmp_path / "4.ckpt") == whole
