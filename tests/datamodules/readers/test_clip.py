"""Frames by their order, upright, with the sound of their moment, whatever wrote the file."""

from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from datamodules.readers.base import BadSample
from datamodules.readers.clip import ClipReader, ClipSource, read_clip
from datamodules.readers.video import VideoReader, write_mp4


def write(path, frames, pts=None, container=None, codec="libx264", rotation=None, rate=10, sound_at=None, gop=12):
    """Frames (T, H, W, 3) at ``pts`` (in 1/``rate`` seconds), and a tone that begins ``sound_at`` seconds after time 0."""
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate, options={"crf": "18", "g": str(gop)} if codec == "libx264" else {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        sound = file.add_stream("aac", rate=16000, layout="mono") if sound_at is not None else None
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
        if sound is not None:
            wave = np.sin(2 * np.pi * 440 * np.arange(32000) / 16000).astype(np.float32) / 2
            for start in range(0, len(wave), 1024):
                chunk = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
                chunk.sample_rate, chunk.pts = 16000, start + round(sound_at * 16000)
                chunk.time_base = Fraction(1, 16000)
                file.mux(sound.encode(chunk))
            file.mux(sound.encode())
    return path


def grey(count, step=6):
    return np.stack([np.full((48, 64, 3), 20 + step * i, np.uint8) for i in range(count)])


def levels(frames):
    return ((frames.mean(axis=(1, 2, 3)) - 20) / 6).round().astype(int).tolist()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_frames_are_numbered_by_their_order(tmp_path, suffix):
    pts = np.cumsum([0, *np.random.default_rng(0).integers(1, 9, 29)]).tolist()  # a phone, a paused screen recording
    path = write(tmp_path / f"x.{suffix}", grey(30), pts)
    with VideoReader(path) as video:
        assert video.frames == 30
        np.testing.assert_allclose(video.times, np.array(pts) / 10, atol=2e-3)
        assert levels(video.read(np.arange(30))) == list(range(30))
        for number in (0, 10, 17, 29):
            assert levels(video.read(np.array([number]))) == [number]


@pytest.mark.parametrize("suffix, codec", [("avi", "libx264"), ("avi", "mpeg4"), ("ts", "libx264"), ("flv", "flv1")])
def test_containers_without_an_index(tmp_path, suffix, codec):
    path = write(tmp_path / f"x.{suffix}", grey(30), codec=codec)
    with VideoReader(path) as video:
        assert video.frames == 30
        for number in (0, 13, 29):
            assert levels(video.read(np.array([number]))) == [number]


def test_a_clip_that_was_cut_without_encoding_shows_its_own_frames(tmp_path):
    source = write(tmp_path / "whole.mp4", grey(36), gop=12)
    with av.open(str(source)) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.dts is not None and packet.pts * packet.time_base >= 1.2:  # from the second key frame on
                packet.stream = stream
                cut.mux(packet)
    with VideoReader(tmp_path / "cut.mp4") as video:
        assert levels(video.read(np.arange(video.frames))) == list(range(12, 36))
        assert levels(video.read(np.array([5]))) == [17] and video.times[0] == 0


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_phone_videos_are_upright(tmp_path, rotation):
    image = np.zeros((32, 64, 3), np.uint8)
    image[:16, :32] = 250
    path = write(tmp_path / "x.mp4", np.stack([image] * 4), rotation=rotation)
    with VideoReader(path) as video:
        frame = video.read(np.array([1]))[0]
    upright = np.rot90(image, rotation // 90)
    assert frame.shape == upright.shape and np.abs(frame.astype(int) - upright).mean() < 12


@pytest.mark.parametrize("late", [0.0, 0.8])
def test_sound_starts_with_the_first_frame(tmp_path, late):
    path = write(tmp_path / "x.mkv", grey(30), np.arange(50, 80).tolist(), sound_at=5 + late)  # a clock that starts at 5 s
    with VideoReader(path) as video:
        wave = video.read_audio(8000)
    begins = np.flatnonzero(np.abs(wave) > 0.2)[0] / 8000
    assert begins == pytest.approx(late, abs=0.08)


def test_names_of_clips(tmp_path):
    write_mp4(tmp_path / "yt.abc_12.5.mp4", grey(4), 10)
    write_mp4(tmp_path / "B[1].mp4", grey(5), 10)
    assert len(read_clip(ClipSource(str(tmp_path / "yt.abc_12.5")), np.arange).frames) == 4
    assert len(read_clip(ClipSource(str(tmp_path / "B[1]")), np.arange).frames) == 5
    with pytest.raises(BadSample, match="^missing video"):
        read_clip(ClipSource(str(tmp_path / "yt.abc")), np.arange)


def test_kept_clips_are_the_same_clips(tmp_path):
    path = write(tmp_path / "x.mkv", grey(30), sound_at=0.0)
    plain, keeping = ClipReader(sample_rate=8000), ClipReader(10, sample_rate=8000)
    source = ClipSource(str(path), range=(5, 20))
    for _ in range(2):
        a, b = (reader(source, lambda count: np.array([count - 1, 0])) for reader in (plain, keeping))
        assert levels(a.frames) == levels(b.frames) == [24, 5]
        np.testing.assert_array_equal(a.times, b.times)
        np.testing.assert_array_equal(a.audio, b.audio)
    assert source in keeping.clips and not plain.clips


def test_folders_of_frames(tmp_path):
    for number in (1, 2, 3):
        Image.new("RGB", (4, 4), (20 * number,) * 3).save(tmp_path / f"image_{number:05d}.jpg", quality=100)
    source = ClipSource(str(tmp_path), "frames", range=(1, 5), fps=2.0, pattern="image_{:05d}.jpg")
    clip = read_clip(source, lambda count: np.array([0, 1]))
    assert clip.frames[:, 0, 0, 0].tolist() == [40, 60] and clip.times.tolist() == [0.5, 1.0]
    with pytest.raises(BadSample, match="^missing image"):
        read_clip(source, lambda count: np.array([count - 1]))
