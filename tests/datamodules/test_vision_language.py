"""Batches of images with captions and questions."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.order import BatchRequest
from datamodules.readers.base import BadSample
from datamodules.readers.image_annotations.sample import ImageAnnotations, ImageSample, ImageSource
from datamodules.tokenizers.base import BERT_SPECIALS, TextTokenizer
from datamodules.transforms.augment import WITH_COLOUR, AugmentedCrop, RandomAugment
from datamodules.transforms.rand_augment import OPERATIONS, RandAugment
from datamodules.transforms.vision_language import SquareImage
from datamodules.vision_language import hold_out
from datamodules.vision_language_rows import VisionLanguageDataset, provided_keys
from models.batch import ANSWER, IMAGE, INDEX, MASKED_IDS, MASKED_LABELS, MATCHED, TOKEN_IDS
from models.two_tower.batch import (
    ANSWER_SCORES,
    CAPTION_IDS,
    CAPTION_OWNER,
    FALSE_IMAGE,
    FALSE_ROWS,
    MEDIUM,
    QUESTION_IDS,
    SECOND_IMAGE,
)

TASKS = ("mlm", "match", "contrastive", "rank", "answer", "reason")


@pytest.fixture
def words(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT_SPECIALS, *"red blue cat dog what is it two".split()]) + "\n")
    return TextTokenizer(str(tmp_path / "vocab.txt"), 8)


@pytest.fixture
def rows(tmp_path):
    sources = []
    for i, colour in enumerate(("red", "blue", "lime", "white")):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (12, 10), colour).save(path)
        sources.append(ImageSource(str(path)))
    samples = [
        ImageSample(
            f"{i}.png#{k}", source, i, ("red cat", "blue dog"), "what is it", answer=i % 3, scores=((i % 3, 1.0), (2, 0.3)),
            second=source, group="what",
        )
        for i, source in enumerate(sources)
        for k in range(2)
    ]  # fmt: skip
    return ImageAnnotations(samples, ("a", "b", "c"))


def dataset(rows, words, tasks=TASKS, **options) -> VisionLanguageDataset:
    return VisionLanguageDataset(rows, words, SquareImage(8), tasks, **options)


def batch_of(data, wanted=(0, 2, 4, 6), epoch=0):
    return data[BatchRequest(np.array(wanted), epoch, 0)]


@pytest.mark.parametrize("negatives", ["dataset", "batch", "hard"])
def test_batches_hold_what_they_promise(rows, words, negatives):
    batch = batch_of(dataset(rows, words, training=True, negatives=negatives, false_texts=3))
    promised = set(provided_keys(TASKS, negatives))
    assert promised <= set(batch) and set(batch) - promised <= {"skipped", "token_mask"}
    assert batch[IMAGE].shape == batch[SECOND_IMAGE].shape == (4, 3, 8, 8)
    assert batch[ANSWER].tolist() == [0, 1, 2, 0] and batch[MEDIUM].tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(batch[ANSWER_SCORES][1], torch.tensor([0.0, 1.0, 0.3]))
    assert batch["candidate_ids"].shape == (4, 4, 8)
    if negatives != "hard":
        assert int(batch[MATCHED].sum()) == 2
    if negatives == "dataset":
        assert batch[FALSE_IMAGE].shape == (2, 3, 8, 8)
    if negatives == "batch":
        assert bool((batch[FALSE_ROWS] != (batch[MATCHED] == 0).nonzero()[:, 0]).all())


def test_draws_depend_on_seed_epoch_and_row_alone(rows, words):
    data = dataset(rows, words, training=True, negatives="dataset")
    first, again, later = batch_of(data), batch_of(data), batch_of(data, epoch=3)
    for key in (MASKED_IDS, MATCHED, FALSE_IMAGE, TOKEN_IDS):
        assert torch.equal(first[key], again[key])
    assert any(not torch.equal(first[key], later[key]) for key in (MASKED_IDS, MATCHED, FALSE_IMAGE, TOKEN_IDS))


def test_masks_never_touch_special_tokens(rows, words):
    data = dataset(rows, words, ("mlm",), training=True)
    share = []
    for epoch in range(60):
        batch = batch_of(data, epoch=epoch)
        chosen = batch[MASKED_LABELS] != -100
        assert torch.equal(batch[MASKED_LABELS][chosen], batch[TOKEN_IDS][chosen])
        assert not bool(chosen[:, 0].any()) and not bool((batch[TOKEN_IDS][chosen] < 5).any())
        share.append(chosen.sum() / (batch[TOKEN_IDS] >= 5).sum())
    assert 0.1 < float(torch.stack(share).mean()) < 0.2


def test_by_image_gives_each_image_once_with_all_captions(rows, words):
    images = dataset(rows, words).by_image()
    batch = images[BatchRequest(np.array([1, 3]), 0, 0)]
    assert len(images) == 4 and images.first == [0, 2, 4, 6] and batch[INDEX].tolist() == [1, 3]
    assert batch[CAPTION_IDS].shape == (4, 8) and batch[CAPTION_OWNER].tolist() == [0, 0, 1, 1]


def test_an_unreadable_image_is_skipped(rows, words):
    broken = rows.samples[0]._replace(image=ImageSource("/nowhere.png"))
    data = dataset(rows._replace(samples=[broken, *rows.samples[1:]]), words, ("answer",))
    with pytest.raises(BadSample):
        data.read(0, np.random.default_rng(0))
    batch = batch_of(data)
    assert batch[INDEX].tolist() == [2, 4, 6] and len(batch["skipped"]) == 1 and len(batch[QUESTION_IDS]) == 3


def test_opened_images_stay_in_memory_as_far_as_they_fit(rows, words):
    data = dataset(rows, words, ("answer",), keep_megabytes=1)
    batch_of(data)
    assert len(data._kept) == 4 and not dataset(rows, words)._kept


def test_images_are_held_out_whole(rows):
    train, val = hold_out(rows, 0.5)
    names = [{sample.key.split("#")[0] for sample in part.samples} for part in (train, val)]
    assert not names[0] & names[1] and len(names[0] | names[1]) == 4 and val.answers == rows.answers


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0, 9, 30])
def test_rand_augment(name, magnitude, monkeypatch):
    monkeypatch.setattr("datamodules.transforms.rand_augment.OPERATIONS", {name: OPERATIONS[name]})
    image = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    first, second = (RandAugment(2, magnitude)(image, np.random.default_rng(1)) for _ in range(2))
    assert first.shape == image.shape and first.dtype == np.uint8 and np.array_equal(first, second)


@pytest.mark.parametrize(
    "transform",
    [
        SquareImage(16, operations=RandAugment(2, 9)),
        SquareImage(16, "squash", crop=AugmentedCrop((0.5, 1.0), flip_probability=0.0, operations=RandomAugment(level=5))),
        SquareImage(16, "squash", crop=AugmentedCrop((0.5, 1.0), operations=RandomAugment(tuple(WITH_COLOUR)))),
        SquareImage(16, "squash", crop=AugmentedCrop((0.5, 1.0), operations=RandAugment(2, 7))),
    ],
)
def test_transforms(transform):
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    assert transform(image, None).shape == transform(image, np.random.default_rng(0)).shape == (3, 16, 16)
    assert torch.equal(transform(image, None), transform(image, None))
    assert not torch.equal(transform(image, np.random.default_rng(0)), transform(image, np.random.default_rng(1)))
