"""Encoding: every kind of features lands in its store, and a killed run goes on to the same bytes."""

from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from datamodules.features.encoding import CaptionBatches, ImageBatches
from datamodules.features.store import PENDING, FeatureStore
from datamodules.readers.base import BadSample
from experiments.alignment.encoding import EncodingModule
from models.encoders.base import Features, FrozenEncoder
from models.errors import UserError
from tests.datamodules.features.test_encoding import Texts, Words


class Mean(FrozenEncoder):
    """Tokens are numbers and their squares; pooled and layers are their means. Wide sums make rounding visible."""

    def __init__(self, layers=True):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(0.1, 1, 64))
        self.feature_dim = self.token_dim = 2
        self.identity, self.with_layers = {"name": "mean"}, layers
        self._freeze()

    def forward(self, x):
        if isinstance(x, dict):
            value, mask = x["input_ids"].float(), x["attention_mask"].bool()
        else:
            value, mask = x.flatten(2).mean(1), None
        tokens = torch.stack([value, value.square()], dim=-1)
        real = torch.ones_like(value) if mask is None else mask.float()
        pooled = (tokens * real[..., None]).sum(1) / real.sum(1, keepdim=True) * self.weight.sum()
        layers = torch.stack([pooled, 2 * pooled, 3 * pooled], dim=1) if self.with_layers else None
        return Features(pooled, tokens, mask, layers)


class Pictures:
    def __len__(self):
        return 23

    def key(self, i):
        return "five" if i == 5 else str(i)

    def image(self, i):
        if i == 5:
            raise BadSample("corrupt image: it is five")
        return torch.full((3, 2, 2), i / 23) + torch.arange(4).view(2, 2)


def predict(module):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    pl.Trainer(accelerator="cpu", devices=1, **options).predict(module, return_predictions=False)


def stores(folder, rows, per_row, kinds=("pooled", "tokens", "layers"), dtype="float32"):
    shapes = {"pooled": None, "tokens": per_row, "layers": 3}
    return {
        kind: FeatureStore.create_or_resume(folder / kind, {"kind": kind}, rows, 2, dtype, per_row=shapes[kind])
        for kind in kinds
    }


def encode_images(folder, encoder, stop=None, **arguments):
    kept = stores(folder, 23, 4, **arguments)
    seen = []

    def done(rows, skipped):
        seen.append((rows, skipped))
        if stop is not None and len(seen) == stop:
            raise KeyboardInterrupt

    pending = np.logical_or.reduce([store.state == PENDING for store in kept.values()])

    def batches(rank, world_size):
        share = ImageBatches(Pictures(), lambda image: image, 4, pending, rank, world_size)
        return (share[i] for i in range(len(share)))

    try:
        predict(EncodingModule(encoder, kept, batches, done))
    except (KeyboardInterrupt, SystemExit):
        pass
    return kept, seen


def test_images_of_every_kind(tmp_path):
    kept, seen = encode_images(tmp_path, Mean())
    images = torch.stack([Pictures().image(i) for i in range(23) if i != 5])
    wanted = Mean()(images)
    rows = np.array([i for i in range(23) if i != 5])
    for kind, store in kept.items():
        assert store.complete and [entry.index for entry in store.skipped()] == [5]
        assert torch.equal(FeatureStore.open(store.path).read(rows), getattr(wanted, kind))
    assert sum(count for count, _ in seen) == 23 and [s.key for _, skipped in seen for s in skipped] == ["five"]


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, stop):
    encode_images(tmp_path / "whole", Mean(), dtype="bfloat16")
    kept, _ = encode_images(tmp_path / "parts", Mean(), stop=stop, dtype="bfloat16")
    assert 0 < len(kept["pooled"].pending()) == len(kept["tokens"].pending()) == 23 - 4 * stop
    _, seen = encode_images(tmp_path / "parts", Mean(), dtype="bfloat16")
    assert sum(count for count, _ in seen) == 23 - 4 * stop
    for kind in kept:
        rows = [(tmp_path / run / kind / "rows.bin").read_bytes() for run in ("whole", "parts")]
        assert rows[0] == rows[1]


def test_captions_of_every_kind(tmp_path):
    texts = Texts(60)
    captions = [caption for own in texts._texts for caption in own]
    kept = stores(tmp_path, len(captions), np.array([len(caption.split()) for caption in captions]))
    batches = partial(CaptionBatches, texts, texts.offsets, Words(), 16, None)
    encoder = Mean()
    predict(EncodingModule(encoder, kept, lambda rank, world_size: batches(rank, world_size), lambda *_: None))
    for row, caption in enumerate(captions):
        wanted = encoder(Words().pad(Words().ids([caption])))
        torch.testing.assert_close(kept["pooled"].read([row]), wanted.pooled)
        torch.testing.assert_close(kept["layers"].read([row], layer=2), 3 * wanted.pooled)
        tokens, mask = kept["tokens"].read_tokens(np.array([row]))
        assert torch.equal(tokens, wanted.tokens) and mask.all()


def test_a_kind_that_the_encoder_does_not_give(tmp_path):
    with pytest.raises(UserError, match="asks for the layers of mean, which gives none: set layers: true"):
        encode_images(tmp_path, Mean(layers=False))
