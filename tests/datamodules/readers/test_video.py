"""Videos are read frame by frame as they were written, with their sound; broken files are errors that datasets can count."""

import numpy as np
import pytest

from datamodules.readers.base import BadSample
from datamodules.readers.video import VideoReader, write_mp4

FPS = 8


@pytest.fixture
def clip(tmp_path):
    """40 frames whose grey level is 5 x the frame number, with a tone of 440 Hz."""
    frames = np.stack([np.full((48, 64, 3), 5 * i, np.uint8) for i in range(40)])
    tone = np.sin(2 * np.pi * 440 * np.arange(5 * 16000) / 16000).astype(np.float32) * 0.5
    write_mp4(tmp_path / "clip.mp4", frames, FPS, tone)
    return tmp_path / "clip.mp4"


def test_frames_by_number_in_any_order(clip):
    with VideoReader(clip) as video:
        assert video.frames == 40
        wanted = np.array([39, 3, 20, 3, 0])
        frames, times = video.read(wanted), video.times[wanted]
        assert frames.shape == (5, 48, 64, 3) and frames.dtype == np.uint8
        np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), 5 * wanted, atol=3)
        np.testing.assert_allclose(times, wanted / FPS, atol=1e-3)


def test_sound_keeps_its_pitch_when_resampled(clip):
    with VideoReader(clip) as video:
        for rate in (16000, 8000):
            sound = video.read_audio(rate)
            assert len(sound) == pytest.approx(5 * rate, rel=0.02)
            loudest = np.abs(np.fft.rfft(sound)).argmax() * rate / len(sound)
            assert loudest == pytest.approx(440, abs=2)


def test_video_without_sound(tmp_path):
    write_mp4(tmp_path / "mute.mp4", np.zeros((4, 32, 32, 3), np.uint8), FPS)
    with VideoReader(tmp_path / "mute.mp4") as video:
        assert video.read_audio(16000) is None


def test_broken_files_are_bad_samples(clip, tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(BadSample, match="^broken video"):
        VideoReader(tmp_path / "text.mp4")
    with pytest.raises(BadSample, match="^missing video: .*missing.mp4"):
        VideoReader(tmp_path / "missing.mp4")
    cut = bytearray(clip.read_bytes())
    start = cut.find(b"mdat") + 8
    cut[start + 200 : start + 20000] = b"\0" * len(cut[start + 200 : start + 20000])
    (tmp_path / "damaged.mp4").write_bytes(cut[: len(clip.read_bytes())])
    with pytest.raises(BadSample), VideoReader(tmp_path / "damaged.mp4") as video:
        video.read(np.arange(40))
