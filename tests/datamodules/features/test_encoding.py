"""Batches for encoding: the same whoever reads them and however often, with next to no padding."""

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from datamodules.features import encoding
from datamodules.features.encoding import CaptionBatches, ImageBatches, captions_of, encoding_loader, token_counts
from datamodules.readers.tar_shards import TarShards
from models.batch import IMAGE, INDEX, SKIPPED, TOKENS
from tests.datamodules.conftest import sample_files, write_tar


class Words:
    """A tokenizer of words: word n is token n."""

    def ids(self, texts):
        return [{"input_ids": list(map(int, text.split())), "attention_mask": [1] * len(text.split())} for text in texts]

    def pad(self, ids):
        longest = max(len(one["input_ids"]) for one in ids)
        return {key: torch.tensor([one[key] + [0] * (longest - len(one[key])) for one in ids]) for key in ids[0]}


class Texts:
    """Samples with captions of 1 to 40 words, among them a few that occur again and again."""

    def __init__(self, samples=300):
        rng = np.random.default_rng(0)
        self.caption_counts = rng.integers(1, 4, samples)
        lengths = rng.geometric(0.1, self.caption_counts.sum()).clip(1, 40)
        texts = [" ".join(map(str, rng.integers(1, 999, n))) for n in lengths]
        texts[::9] = ["7 7 7"] * len(texts[::9])
        self.offsets = np.concatenate([[0], np.cumsum(self.caption_counts)])
        self._texts = [texts[a:b] for a, b in zip(self.offsets[:-1], self.offsets[1:], strict=True)]

    def captions(self, i):
        return self._texts[i]


@pytest.fixture
def shards(tmp_path):
    files = {k: v for n in range(11) for k, v in sample_files(n).items()}
    files["000000004.jpg"] = b"not an image"
    write_tar(tmp_path / "0.tar", files)
    return TarShards(str(tmp_path))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_images(shards, workers):
    batches = list(encoding_loader(ImageBatches(shards, pil_to_tensor, batch_size=4), workers))
    assert [batch[INDEX].tolist() for batch in batches] == [[0, 1, 2, 3], [5, 6, 7], [8, 9, 10]]
    assert [[entry.index for entry in batch[SKIPPED]] for batch in batches] == [[], [4], []]
    for batch in batches:
        wanted = torch.stack([pil_to_tensor(shards.image(i)) for i in batch[INDEX].tolist()])
        assert torch.equal(batch[IMAGE], wanted)


def test_batches_are_the_same_whatever_is_pending_and_whoever_reads(shards):
    whole = ImageBatches(shards, pil_to_tensor, batch_size=4).batches
    pending = np.zeros(11, bool)
    pending[9] = True
    (rest,) = ImageBatches(shards, pil_to_tensor, 4, pending).batches
    assert np.array_equal(rest, whole[2])
    shares = [ImageBatches(shards, pil_to_tensor, 4, rank=rank, world_size=2).batches for rank in range(2)]
    assert [len(share) for share in shares] == [2, 1]
    assert sorted(np.concatenate(sum(shares, [])).tolist()) == list(range(11))
    assert list(encoding_loader(ImageBatches(shards, pil_to_tensor, 4, np.zeros(11, bool)), 0)) == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("window", [100, 100_000])
def test_every_caption_goes_to_its_rows(workers, window, monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW", window)
    texts = Texts()
    wanted = list(captions_of(texts, texts.offsets, np.arange(texts.offsets[-1])))
    found = {}
    for batch in encoding_loader(CaptionBatches(texts, texts.offsets, Words(), batch_size=32), workers):
        real = batch[TOKENS]["attention_mask"].bool()
        assert len(real) <= 32 and len(real) == len(batch["repeats"])
        rows = iter(batch[INDEX].tolist())
        for ids, mask, repeats in zip(batch[TOKENS]["input_ids"], real, batch["repeats"].tolist(), strict=True):
            for _ in range(repeats):
                found[next(rows)] = " ".join(map(str, ids[mask].tolist()))
        assert next(rows, None) is None
    assert [found[row] for row in range(len(wanted))] == wanted


def test_padding_is_bounded_and_repeated_captions_are_encoded_once():
    texts = Texts(3000)
    padded = real = captions = 0
    for batch in CaptionBatches(texts, texts.offsets, Words(), batch_size=64):
        mask = batch[TOKENS]["attention_mask"]
        assert mask.numel() <= encoding.PADDING * int(mask.sum())
        padded, real, captions = padded + mask.numel(), real + int(mask.sum()), captions + len(mask)
    assert padded <= 1.05 * real
    distinct = {text for own in texts._texts for text in own}
    assert captions == len(distinct) < texts.offsets[-1] * 0.95


def test_captions_are_shared_out_and_left_out_by_whole_batches(monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW", 128)
    texts = Texts()
    rows = int(texts.offsets[-1])

    def read(**arguments):
        return [batch[INDEX].tolist() for batch in CaptionBatches(texts, texts.offsets, Words(), 16, **arguments)]

    whole = read()
    shares = [read(rank=rank, world_size=3) for rank in range(3)]
    assert sorted(sum(shares, [])) == sorted(whole) and all(shares)
    pending = np.zeros(rows, bool)
    pending[[5, rows - 1]] = True
    assert read(pending=pending) == [batch for batch in whole if 5 in batch or rows - 1 in batch]


@pytest.mark.parametrize("workers", [0, 2])
def test_token_counts(workers, monkeypatch):
    monkeypatch.setattr(encoding, "WINDOW", 64)
    texts = Texts()
    wanted = [len(caption.split()) for own in texts._texts for caption in own]
    assert token_counts(texts, texts.offsets, Words(), workers).tolist() == wanted
