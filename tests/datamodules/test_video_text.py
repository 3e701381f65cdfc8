"""Batches of the simulated data set: what they hold, that they repeat, and what happens to bad clips."""

from functools import partial

import numpy as np
import pytest
import torch

from datamodules.order import BatchRequest
from datamodules.readers.video import VideoReader
from datamodules.readers.video_annotations import captions, questions
from datamodules.simulated.clips import make_clip, write_clips
from datamodules.transforms.video import ClipTransform, ImageTransform
from datamodules.video_text import VideoTextDataModule
from models import batch as keys
from models.all_in_one.batch import FALSE_ROWS, FALSE_VIDEO, IMAGES
from models.errors import UserError

WORLD = partial(write_clips, train=20, val=4, test=8, size=32)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return str(WORLD(str(tmp_path_factory.mktemp("clips"))))


def module(root, reader, tasks, **settings) -> VideoTextDataModule:
    settings = {"text_length": 12, "num_workers": 0, "batch_size": 6, **settings}
    data = VideoTextDataModule(root, {"clips": reader}, tasks, ClipTransform(24), ClipTransform(24), **settings)
    data.prepare_data()
    data.setup()
    return data


def request(rows=range(6), epoch=0, seed=0) -> BatchRequest:
    return BatchRequest(np.array(list(rows)), epoch, seed)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


def test_training_batch_is_a_function_of_seed_epoch_and_rows(root):
    tasks = ["match", "mlm", "rank", "contrastive"]
    first, second = (module(root, captions.webvid, tasks, keep_megabytes=m).splits["train"] for m in (0, 50))
    batch = first[request()]
    first[request(range(6, 12))]
    assert same(batch, first[request()])
    assert same(batch, second[request()])  # kept clips are the same clips
    assert not torch.equal(batch[keys.VIDEO], first[request(epoch=1)][keys.VIDEO])
    assert not torch.equal(batch[keys.MASKED_IDS], first[request(seed=1)][keys.MASKED_IDS])
    assert batch[keys.MATCHED].sum() == 3 and len(batch[FALSE_VIDEO]) == 3
    assert batch[keys.CANDIDATE_IDS].shape == (6, 16, 12)
    assert torch.equal(batch[keys.CANDIDATE_IDS][:, 0], batch[keys.TOKEN_IDS])
    changed = batch[keys.MASKED_IDS] != batch[keys.TOKEN_IDS]
    assert (batch[keys.MASKED_LABELS][changed] == batch[keys.TOKEN_IDS][changed]).all()


def test_evaluation_repeats_and_views_differ(root):
    data = module(root, captions.msrvtt_retrieval, ["contrastive"], eval_batch_size=8)
    plain, again = (next(iter(data.evaluation_dataloader("test"))) for _ in range(2))
    other = next(iter(data.evaluation_dataloader("test", view=1)))
    assert same(plain, again)
    assert torch.equal(plain[keys.TOKEN_IDS], other[keys.TOKEN_IDS])
    assert not torch.equal(plain[keys.VIDEO], other[keys.VIDEO])


def test_false_clips_of_the_batch_are_never_the_own_one(root):
    data = module(root, captions.webvid, ["match"], false_clips="batch")
    batch = data.splits["train"][request()]
    false_of = torch.nonzero(batch[keys.MATCHED] == 0).flatten()
    assert FALSE_VIDEO not in batch
    assert len(false_of) == len(batch[FALSE_ROWS]) and (false_of != batch[FALSE_ROWS]).all()


def test_splits_facts_and_held_out_clips(root):
    data = module(root, questions.msrvtt_qa, ["answer"], spare_answers=1)
    assert {name: len(split) for name, split in data.splits.items()} == {"train": 30, "val": 6, "test": 12}
    assert data.facts()["num_answers"] == 11
    held = module(root, captions.msrvtt_retrieval, ["contrastive"], val_fraction=0.4)
    train, val = ({s.key for s in held.splits[name].samples} for name in ("train", "val"))
    assert not train & val and len(train | val) == 24
    test = module(root, captions.msrvtt_retrieval, ["contrastive"], validation="test")
    assert test.splits["val"].fingerprint == test.splits["test"].fingerprint
    assert any("VALIDATED ON TEST" in note for note in test.notes)


def test_choices_hold_the_clip_backwards(root):
    data = module(root, questions.msrvtt_choice, ["choice"])
    clip, _ = make_clip(0, 2 * 10**9, 12, 32)
    sample = data.splits["test"].samples[0]
    assert sample.texts[sample.answer] == clip.caption and clip.reversed_caption in sample.texts
    with pytest.raises(UserError, match="no training split"):
        data.train_dataloader()


def test_co_training_stream(root):
    pictures = {"cc3m": captions.cc3m}
    data = module(root, captions.webvid, ["match", "mlm"], images=pictures, image_transform=ImageTransform(32, 64))
    batch = data.splits["train"][request()]
    assert batch[IMAGES][keys.VIDEO].shape[:2] == (6, 1)
    assert batch[IMAGES][keys.MATCHED].sum() == 3


def test_bad_and_short_clips_are_counted(root, tmp_path):
    from datamodules.readers.video import write_mp4

    own = WORLD(str(tmp_path))
    videos = own / "msrvtt" / "videos" / "all"
    (videos / "video0.mp4").write_bytes((videos / "video0.mp4").read_bytes()[:300])
    write_mp4(videos / "video1.mp4", np.zeros((2, 32, 32, 3), np.uint8), fps=6)
    (videos / "video2.mp4").unlink()
    data = module(str(own), questions.msrvtt_qa, ["answer"])
    batch = data.splits["train"][request(range(8))]
    reasons = [entry.reason.split(":")[0] for entry in batch[keys.SKIPPED]]
    assert reasons == ["broken video"] * 2 + ["too short"] + ["missing video"] * 2
    assert batch[keys.INDEX].tolist() == [8, 9, 10, 11, 12, 5, 6, 7] and len(batch[keys.VIDEO]) == 8
    data.splits["train"].training = False
    batch = data.splits["train"][request(range(8))]
    assert batch[keys.INDEX].tolist() == [5, 6, 7] and len(batch[keys.VIDEO]) == 3
    assert data.splits["train"][request([0, 1])][keys.INDEX].tolist() == [2 + 3]  # the next one that can be read


def test_no_frame_of_a_clip_tells_its_order():
    """The first and the last act of a turn, and a move with its way reversed, show the same things."""
    clip, frames = make_clip(0, 2, 12, 32)
    assert clip.kind == "turn" and len(np.unique(frames[8:].reshape(4, -1, 3), axis=1)[0]) == 1  # nothing at the end
    answers = {"turn": set(), "move": set()}
    for index in range(60):
        clip, _ = make_clip(0, index, 12, 32)
        answers[clip.kind] |= {answer for _, answer, _ in clip.questions}
    assert answers["move"] == {"closer", "away"} and len(answers["turn"]) == 8


def test_moves_go_their_way():
    for index in range(1, 30, 2):
        clip, frames = make_clip(0, index, 12, 32)
        shown = np.abs(frames.astype(int) - frames[0, 0, 0].astype(int)).sum(axis=3) > 60
        areas = shown.sum(axis=(1, 2))
        assert (areas[:8] > 0).all() and (frames[8:] < 40).all()
        small, large = (areas[:4], areas[4:8]) if clip.way == "closer" else (areas[4:8], areas[:4])
        assert small.max() < large.min()


def test_files_are_real_videos(root):
    with VideoReader(f"{root}/msrvtt/videos/all/video3.mp4") as video:
        assert video.frames == 12
        written = make_clip(0, 3, 12, 32)[1]
        assert np.abs(video.read(np.arange(12)).astype(int) - written).mean() < 12
