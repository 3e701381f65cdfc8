"""Lists of all layouts, frames or videos, sound or none, and sampling that is a pure function of seed, epoch and row."""

import wave

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.audio_visual import AudioVisualDataModule
from datamodules.order import BatchRequest
from datamodules.readers.video import write_mp4
from datamodules.readers.video_lists import VideoRow, read_list
from datamodules.simulated.audio_visual import CLASSES, make_video, render, sound, write_audio_visual
from datamodules.transforms.frame_sampling import sample_frames
from models.batch import AUDIO, AUDIO_VALID, INDEX, LABEL, LABELS, SILENT, SKIPPED, TIMES, VIDEO
from models.errors import UserError

READING = {"snippets": 4, "image_size": 32, "sample_rate": 8000, "clip_seconds": 0.5, "num_workers": 0, "frame_rate": 10.0}


def request(*rows, epoch=0):
    return BatchRequest(np.array(rows), epoch, 0)


def frames_of(length, count):
    """Numbers from 1, as image files are named."""
    return sample_frames(count, length, official="adafocus") + 1


def write_wav(path, seconds=3.0, rate=24000):
    path.parent.mkdir(parents=True, exist_ok=True)
    tone = np.sin(2 * np.pi * 500 * np.arange(int(seconds * rate)) / rate) * 16000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(tone.astype("<i2").tobytes())


def write_frames(folder, pattern, count, first=1, size=(80, 60)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        grey = np.full((size[1], size[0], 3), 5 * number, np.uint8)
        Image.fromarray(grey).save(folder / pattern.format(number), quality=95)


@pytest.mark.parametrize(
    "layout, text, expected",
    [
        ("activitynet", "v_a,50,3\nv_b,2,1\nv_c,9,5,2,5\n", [("v_a", 1, 50, (3,)), ("v_c", 1, 9, (2, 5))]),
        ("fcvid", "x/y,7,0\n\n", [("x/y", 1, 7, (0,))]),
        ("mini_kinetics", "riding a bike/abc 30 4\n", [("riding a bike/abc", 1, 30, (4,))]),
        ("kinetics_sounds", "clip;11;20;6\n", [("clip", 11, 10, (6,))]),
    ],
)
def test_lists(tmp_path, layout, text, expected):
    (tmp_path / "list.txt").write_text(text)
    assert read_list(tmp_path / "list.txt", layout) == [VideoRow(*row) for row in expected]


@pytest.mark.parametrize("line", ["v_a,50", "v_a,many,1", ",50,1", "v_a,50,1,2,3,4"])
def test_a_line_that_is_not_understood_is_named(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"v_b,9,0\n{line}\n")
    with pytest.raises(UserError, match="line 2"):
        read_list(tmp_path / "list.txt", "activitynet")


def test_frames_are_sampled_from_every_stretch():
    assert frames_of(100, 4).tolist() == [13, 38, 63, 88]
    assert frames_of(4, 4).tolist() == [1, 2, 3, 4] and frames_of(3, 5).tolist() == [1, 2, 3, 3, 3]
    found = np.stack([sample_frames(4, 41, np.random.default_rng(i), "adafocus") + 1 for i in range(300)])
    for stretch in range(4):
        assert set(found[:, stretch]) == set(range(10 * stretch + 1, 10 * stretch + 11))


@pytest.fixture
def frames_root(tmp_path):
    """ActivityNet's layout with pictures and wavs: two training videos, one of them mute, and one whose frames are lost."""
    for name in ("v_a", "v_b"):
        write_frames(tmp_path / "frames" / name, "image_{:05d}.jpg", 30)
    write_wav(tmp_path / "audio" / "v_a.wav")
    (tmp_path / "actnet_train_split.txt").write_text("v_a,30,1,0\nv_b,30,2\nv_lost,30,0\n")
    (tmp_path / "actnet_val_split.txt").write_text("v_a,30,1\n")
    (tmp_path / "classInd.txt").write_text("one\ntwo\nthree\n")
    return tmp_path


def module_of(root, **settings):
    data = AudioVisualDataModule(str(root), **{**READING, **settings})
    data.setup()
    return data


def test_pictures_with_wavs(frames_root):
    data = module_of(frames_root)
    assert data.facts() == {"num_classes": 3, "snippets": 4}
    batch = data.splits["train"][request(0, 1, 2)]
    assert batch[INDEX].tolist() == [0, 1] and [s.index for s in batch[SKIPPED]] == [2]
    assert batch[SKIPPED][0].reason.startswith("missing video")
    assert batch[VIDEO].shape == (2, 4, 3, 32, 32) and batch[VIDEO].dtype == torch.uint8
    numbers = frames_of(30, 4)
    np.testing.assert_allclose(batch[VIDEO].float().mean(dim=(2, 3, 4))[0], 5 * numbers, atol=2)
    np.testing.assert_allclose(batch[TIMES][0], (numbers - 1) / 10.0)
    assert batch[AUDIO].shape == (2, 4, 4000) and batch[AUDIO_VALID].tolist() == [True, False] and batch[SILENT] is False
    assert not batch[AUDIO][1].any()
    spectrum = np.abs(np.fft.rfft(batch[AUDIO][0, 1].numpy()))
    assert spectrum.argmax() * 2 == pytest.approx(500, abs=4)  # resampled from 24 kHz, its pitch kept
    assert batch[LABELS].tolist() == [[0, 1, -1], [2, -1, -1]] and batch[LABEL].tolist() == [0, 2]


def test_training_is_a_pure_function_of_seed_epoch_and_row(frames_root):
    data = module_of(frames_root)
    train = data.splits["train"].augmented()
    first, again = (train[request(1, 0)] for _ in range(2))
    alone, later = train[request(0)], train[request(0, epoch=1)]
    assert torch.equal(first[VIDEO], again[VIDEO]) and torch.equal(first[VIDEO][1], alone[VIDEO][0])
    assert not torch.equal(later[VIDEO], alone[VIDEO])
    labels = {int(train[request(0, epoch=e)][LABEL][0]) for e in range(20)}
    assert labels == {0, 1}  # one true label at random, never the padding


def test_evaluation_crop_is_resize_then_centre_crop(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (45, 83, 3), dtype=np.uint8)
    (tmp_path / "frames" / "v").mkdir(parents=True)
    for number in range(1, 5):
        Image.fromarray(noise).save(tmp_path / "frames" / "v" / f"image_{number:05d}.jpg", quality=100, subsampling=0)
    (tmp_path / "actnet_train_split.txt").write_text("v,4,0\n")
    frame = module_of(tmp_path).splits["train"][request(0)][VIDEO][0, 0]
    picture = Image.open(tmp_path / "frames" / "v" / "image_00001.jpg")
    side = round(32 * 256 / 224)
    whole = picture.resize((int(83 * side / 45), side), Image.Resampling.BILINEAR)
    left, top = round((whole.width - 32) / 2), round((side - 32) / 2)
    expected = np.asarray(whole.crop((left, top, left + 32, top + 32))).transpose(2, 0, 1)
    assert np.abs(frame.numpy().astype(int) - expected.astype(int)).max() <= 1


def test_videos_with_their_own_sound_at_their_own_rate(tmp_path):
    frames = np.stack([np.full((40, 48, 3), 3 * i, np.uint8) for i in range(60)])
    tone = np.sin(2 * np.pi * 440 * np.arange(6 * 16000) / 16000).astype(np.float32) * 0.5
    (tmp_path / "videos").mkdir()
    write_mp4(tmp_path / "videos" / "clip.mp4", frames, 10, tone)
    write_mp4(tmp_path / "mute.mp4", frames, 10)
    (tmp_path / "broken.mp4").write_text("not a video")
    (tmp_path / "train.txt").write_text("clip;1;180;0\nmute;31;60;1\nbroken;1;60;1\n")  # lists count 30 frames a second
    batch = module_of(tmp_path, layout="kinetics_sounds").splits["train"][request(0, 1, 2)]
    assert batch[AUDIO_VALID].tolist() == [True, False] and batch[SKIPPED][0].reason.startswith("broken video")
    np.testing.assert_allclose(batch[TIMES][0], (frames_of(60, 4) - 1) / 10, atol=0.02)
    np.testing.assert_allclose(batch[TIMES][1], (30 + frames_of(30, 4) - 1) / 10, atol=0.02)
    kept = module_of(tmp_path, layout="kinetics_sounds", keep_megabytes=100).splits["train"][request(0, 1)]
    assert torch.equal(kept[VIDEO], batch[VIDEO]) and torch.equal(kept[AUDIO], batch[AUDIO])


def test_mistakes_are_explained(tmp_path, frames_root):
    with pytest.raises(UserError, match="no fcvid_train_split.txt"):
        module_of(frames_root, layout="fcvid")
    with pytest.raises(UserError, match="resize=16"):
        module_of(frames_root, resize=16)
    (frames_root / "classInd.txt").write_text("one\n")
    with pytest.raises(UserError, match="label 2.*1 class names"):
        module_of(frames_root)


def test_simulated_videos_say_what_they_mean(tmp_path):
    video = make_video(0, 7)
    assert video == make_video(0, 7)
    events = [s for s in video.slots if s.shape >= 0 and s.chirps]
    assert len(events) == 2 and {s.shape for s in events} == {video.label}
    assert sum(s.chirps for s in video.slots) == 4 and sum(s.shape >= 0 for s in video.slots) == 6
    frames, loud = render(0, 7, video, 48, 3), sound(0, 7, video).reshape(12, -1)
    chirping = np.abs(loud).mean(axis=1)
    assert min(chirping[[s.chirps for s in video.slots]]) > max(chirping[[not s.chirps for s in video.slots]])
    flat = frames.reshape(12, 3, -1).std(axis=(1, 2))
    assert min(flat[[s.shape >= 0 for s in video.slots]]) > max(flat[[s.shape < 0 for s in video.slots]])

    folder = write_audio_visual(str(tmp_path), train=2, val=1, test=1, silent=0.5)
    assert write_audio_visual(str(tmp_path), train=2, val=1, test=1, silent=0.5) == folder
    data = module_of(folder, snippets=12, image_size=48, resize=48)
    assert data.class_names == list(CLASSES) and [len(data.splits[s]) for s in ("train", "val", "test")] == [2, 1, 1]
    batch = data.splits["train"][request(0, 1)]
    assert batch[LABEL].tolist() == [make_video(0, i).label for i in range(2)]
    drawn = render(0, 0, make_video(0, 0), 48, 3)[1::3]
    difference = np.abs(batch[VIDEO][0].permute(0, 2, 3, 1).numpy().astype(int) - drawn)
    assert difference.mean() < 8


@pytest.mark.parametrize("path", ["../v_a", "/data/v_a", "a/../../b"])
def test_lists_name_nothing_outside_the_data_set(tmp_path, path):
    (tmp_path / "list.txt").write_text(f"\ufeffv_b,9,0\n{path},50,1\n")
    with pytest.raises(UserError, match="line 2: bad path"):
        read_list(tmp_path / "list.txt", "activitynet")
    (tmp_path / "list.txt").write_text("\ufeffv_b,9,0\r\n")
    assert read_list(tmp_path / "list.txt", "activitynet") == [VideoRow("v_b", 1, 9, (0,))]


def test_a_bad_frame_is_one_skip_with_its_reason(frames_root):
    (frames_root / "frames" / "v_b" / f"image_{frames_of(30, 4)[1]:05d}.jpg").write_bytes(b"<html>")
    batch = module_of(frames_root).splits["train"][request(0, 1)]
    assert batch[INDEX].tolist() == [0] and batch[SKIPPED][0].reason.startswith("corrupt image")
