"""Features made at every step: augmented purely by (seed, epoch, row), encoded without a graph, resumed exactly."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from torch import nn

from datamodules.base import BaseDataModule
from datamodules.features.online import OnlineFeatureDataModule
from datamodules.order import BatchRequest
from datamodules.readers.base import BadSample
from datamodules.transforms.augment import AugmentedCrop, RandomAugment
from experiments.run.callbacks import RandomSteps
from lightning_modules.alignment import AlignmentModule
from models.alignment.batch import EXTRA_TEXT_FEATURES, IMAGE_TOKENS, TEXT_MASK, TEXT_TOKENS
from models.alignment.projectors import ResidualMLPProjector, TokenProjector
from models.batch import IMAGE, INDEX, SKIPPED, TOKENS
from models.encoders.base import Features, FrozenEncoder
from models.encoders.preprocess import ImagePreprocess
from models.errors import UserError
from models.freeze_align.head import TokenAlignmentHead
from models.losses.contrastive import InfoNCELoss

PAIRS = 13
KEEP = {"vision": ["tokens"], "text": ["tokens", "pooled"]}


class _Pictures:
    """Row i has a picture of its own and 1 + i % 3 captions; ``broken`` rows cannot be read, row 12 has no caption."""

    pre_encoded = False
    caption_counts = np.array([*(1 + i % 3 for i in range(PAIRS - 1)), 0])

    def __init__(self, broken=()):
        self.broken = set(broken)

    def __len__(self):
        return PAIRS

    def captions(self, i):
        return [f"{'word ' * (i + 1)}{j}" for j in range(self.caption_counts[i])]

    def key(self, i):
        return f"key{i}"

    def image(self, i):
        if i in self.broken:
            raise BadSample("corrupt image: test")
        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 26, 3), dtype=np.uint8))


class _Vision(FrozenEncoder):
    feature_dim, token_dim, preprocess = 6, 6, ImagePreprocess((8, 8), 8)

    def __init__(self):
        super().__init__()
        self.network = nn.Conv2d(3, 6, 4, stride=4)
        self._freeze()

    @torch.no_grad()
    def forward(self, pixels):
        patches = self.network(pixels).flatten(2).mT
        pooled = patches.mean(dim=1)
        return Features(pooled, torch.cat([pooled[:, None], patches], dim=1))


class _Text(FrozenEncoder):
    feature_dim = token_dim = 5

    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Embedding(40, 5), nn.Dropout(0.3))
        self._freeze()

    @staticmethod
    def tokenize(texts):
        ids = [[1 + hash_of(word) for word in text.split()] for text in texts]
        longest = max(map(len, ids))
        padded = torch.tensor([own + [0] * (longest - len(own)) for own in ids])
        return {"input_ids": padded, "attention_mask": (padded > 0).long()}

    @torch.no_grad()
    def forward(self, tokens):
        states, mask = self.network(tokens["input_ids"]), tokens["attention_mask"]
        return Features((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), states, mask.bool())


def hash_of(word: str) -> int:
    return sum(map(ord, word)) % 39


def _data(broken=(), augment=None, **arguments) -> OnlineFeatureDataModule:
    torch.manual_seed(0)
    source = BaseDataModule()
    source.splits = {"train": _Pictures(broken)}
    augment = augment or AugmentedCrop(operations=RandomAugment())
    given = {"positives": 1, "batch_size": 4, "num_workers": 0, "seed": 5, **arguments}
    return OnlineFeatureDataModule(source, _Vision(), _Text(), KEEP, None, augment, **given)


def _fetch(data, rows, epoch=0, seed=5):
    return data.splits["train"][BatchRequest(np.array(rows), epoch, seed)]


def test_augmentation_is_a_function_of_seed_epoch_and_row():
    data = _data()
    together = _fetch(data, [7, 2, 5])
    assert together[INDEX].tolist() == [2, 5, 7]
    for place, row in enumerate((2, 5, 7)):
        alone = _fetch(data, [row])
        assert torch.equal(alone[IMAGE][0], together[IMAGE][place])
    for other in (_fetch(data, [2, 5, 7], epoch=1), _fetch(data, [2, 5, 7], seed=6)):
        assert all(not torch.equal(a, b) for a, b in zip(other[IMAGE], together[IMAGE], strict=True))
    assert together[IMAGE].shape == (3, 3, 8, 8)


def test_without_chance_a_picture_is_its_preprocessing():
    plain = AugmentedCrop(scale=(1, 1), ratio=(26 / 20, 26 / 20), flip_probability=0)
    (image,) = _fetch(_data(augment=plain), [3])[IMAGE]
    squash = ImagePreprocess((8, 8), None)
    assert torch.equal(image, squash(_Pictures().image(3)))
    mirrored = AugmentedCrop(scale=(1, 1), ratio=(26 / 20, 26 / 20), flip_probability=1)
    assert torch.equal(_fetch(_data(augment=mirrored), [3])[IMAGE][0], image.flip(2))


@pytest.mark.parametrize("extra", ["next", "random"])
def test_captions_and_their_extra_ones(extra):
    data = _data(positives=2, extra_caption=extra)
    batch = _fetch(data, [0, 1, 2])
    captions = [_Pictures().captions(i) for i in range(3)]
    tokens = batch[TOKENS]["input_ids"]
    assert len(tokens) == 6
    wanted = _Text.tokenize([own[0] for own in captions] + [captions[0][0], captions[1][1], captions[2][1]])["input_ids"]
    if extra == "next":
        assert torch.equal(tokens, wanted)
    assert torch.equal(tokens[:5], wanted[:5])  # with two captions 'random' has no choice either
    features = data.on_after_batch_transfer(batch, 0)
    assert features[EXTRA_TEXT_FEATURES].shape == (3, 5)
    assert not torch.equal(features[EXTRA_TEXT_FEATURES][1], features["text_features"][1])


def test_encoders_run_without_a_graph_and_as_they_do_alone():
    data = _data()
    batch = _fetch(data, [1, 4])
    features = data.on_after_batch_transfer(batch, 0)
    assert set(features) == {INDEX, IMAGE_TOKENS, TEXT_TOKENS, "text_features", TEXT_MASK}
    assert torch.equal(features[IMAGE_TOKENS], data.vision(batch[IMAGE]).tokens)
    assert torch.equal(features[TEXT_TOKENS], data.text(batch[TOKENS]).tokens)
    assert not any(value.requires_grad for value in features.values())
    assert not any(p.requires_grad for encoder in (data.vision, data.text) for p in encoder.parameters())
    assert data.facts() == {"vision_dim": 6, "text_dim": 5}
    with pytest.raises(UserError, match="gives no layers"):
        data.keep = {**KEEP, "vision": ["layers"]}
        data.on_after_batch_transfer(batch, 0)


def test_dropout_of_the_frozen_text_encoder_is_drawn_by_seed_epoch_and_rows():
    data = _data(text_dropout=True)
    batch = _fetch(data, [1, 4, 8])
    before = torch.get_rng_state()
    first, again = (data.on_after_batch_transfer(dict(batch), 0)[TEXT_TOKENS] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before) and not data.text.network.training
    assert torch.equal(first, again)
    whole = data.text(batch[TOKENS]).tokens
    dropped = (first == 0) & (whole != 0)
    assert 0.1 < dropped.float().mean() < 0.5
    assert torch.allclose(first[~dropped], whole[~dropped] / 0.7)
    for other in (_fetch(data, [1, 4, 8], epoch=1), _fetch(data, [1, 4, 8], seed=6)):
        assert not torch.equal(data.on_after_batch_transfer(other, 0)[TEXT_TOKENS], first)


def test_an_unreadable_picture_is_counted_and_replaced_by_the_next():
    data = _data(broken=[3, 4, 11])
    batch = _fetch(data, [1, 3, 11])
    assert batch[INDEX].tolist() == [1, 5, 0]  # 12 has no caption: behind the last row comes the first
    assert [entry.index for entry in batch["skipped"]] == [3, 4, 11]
    assert torch.equal(batch[IMAGE][1], _fetch(data, [5])[IMAGE][0])
    data.report_skipped("train", batch["skipped"])
    assert data.source.skip_report()["splits"]["train"]["total"] == 3
    none = _fetch(_data(broken=range(PAIRS)), [2])
    assert len(none[INDEX]) == 0 and IMAGE not in none and len(none[SKIPPED]) == 12
    data.trainer = SimpleNamespace(state=SimpleNamespace(stage=SimpleNamespace(value="train")))
    with pytest.raises(UserError, match="(?s)12 of 13 samples.*corrupt image"):
        data.on_before_batch_transfer(none, 0)


def test_bad_arguments():
    with pytest.raises(UserError, match="batch_size=0"):
        _data(batch_size=0)
    data = _data(batch_size=500)
    assert "500" in data.notes[0] and data.batch_size == 12 == len(data.splits["train"])
    encoded = SimpleNamespace(splits={"train": SimpleNamespace(pre_encoded=True)})
    with pytest.raises(UserError, match="features=pairs"):
        OnlineFeatureDataModule(encoded, _Vision(), _Text(), KEEP, None, AugmentedCrop())


def _fit(folder, max_steps, resume=None, **arguments):
    """Trains freeze-align's head, with its dropout, for some steps; returns the weights, the encoders and the rows seen."""
    data = _data(text_dropout=True, **arguments)
    head = partial(
        TokenAlignmentHead,
        embed_dim=8,
        local_vision=TokenProjector,
        cls_vision=TokenProjector,
        local_text=TokenProjector,
        text=ResidualMLPProjector,
    )
    module = AlignmentModule(head, InfoNCELoss(), partial(torch.optim.AdamW, lr=1e-2), decay_all=False, **data.facts())
    trainer = pl.Trainer(
        callbacks=[RandomSteps(5)], max_steps=max_steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data, ckpt_path=resume)
    trainer.save_checkpoint(folder / f"{max_steps}.ckpt")
    return module, data


def test_training_moves_the_head_alone_and_resumes_exactly(tmp_path):
    whole, data = _fit(tmp_path, 8, broken=[3])  # three steps an epoch
    untouched = _data()
    for ours, theirs in ((data.vision, untouched.vision), (data.text, untouched.text)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(p.grad is None for encoder in (data.vision, data.text) for p in encoder.parameters())
    assert all(name.startswith("head.") for name in whole.state_dict())  # the encoders are in no checkpoint
    halfway, _ = _fit(tmp_path, 4, broken=[3])  # within the second epoch
    assert all((a != b).any() for a, b in zip(halfway.parameters(), whole.parameters(), strict=True))
    torch.manual_seed(999)  # a new process has another generator
    resumed, _ = _fit(tmp_path, 8, resume=tmp_path / "4.ckpt", broken=[3], num_workers=2)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=0, atol=0, msg=name)
    assert data.source.skip_report()["total"] == 1
