"""One way to read a clip, wherever it lies: a video file, a folder of frames, one image, a member of a tar or a row of an Arrow
file.
"""

from __future__ import annotations

import glob
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.readers.arrow import arrow_image
from datamodules.readers.base import BadSample
from datamodules.readers.images import open_rgb
from datamodules.readers.sound import read_sound
from datamodules.readers.video import VideoReader

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov", ".flv", ".gif", ".ts")
LARGEST_MEMBER = 2**31  # bytes of a video inside a tar, which is read into memory


class Clip(NamedTuple):
    """A piece of video.

    ``frames`` (T, H, W, 3) uint8 RGB. ``times`` (T,) seconds after the first frame of the file. ``audio`` (n,) float32 in
    [-1, 1], mono, the whole sound from time 0 on; empty if there is none or it was not asked for. ``valid``: whether there is
    sound.
    """

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]
    audio: NDArray[np.float32]
    valid: bool


class ClipSource(NamedTuple):
    """Where a clip lies.

    Attributes:
        path: of the file or folder. A video may lack its suffix.
        kind: ``video`` (any file PyAV decodes), ``frames`` (a folder of numbered images), ``image`` (one image), ``tar`` (a
            video that is a member of an uncompressed tar), ``arrow`` (the image in one row of an Arrow file).
        span: (start, end) in seconds; None for the whole.
        range: (first, count) in frames; None for the whole.
        fps: frames per second of a folder.
        pattern: name of frame k of a folder, counted from 1, such as ``image_{:05d}.jpg``; "" for all images sorted by number.
        offset: first byte of the tar's member, or row of the Arrow file.
        size: bytes of the tar's member.
        sound: path of a sound file; "" for the video's own sound.
        official: open images as the official codes do, see :func:`~datamodules.readers.images.open_rgb`.
    """

    path: str
    kind: Literal["video", "frames", "image", "tar", "arrow"] = "video"
    span: tuple[float, float] | None = None
    range: tuple[int, int] | None = None
    fps: float = 0.0
    pattern: str = ""
    offset: int = 0
    size: int = 0
    sound: str = ""
    official: bool = False


Choose = Callable[[int], NDArray[np.int64]]  # number of frames in the clip -> numbers of those that are read


def read_clip(source: ClipSource, choose: Choose, sample_rate: int | None = None) -> Clip:
    """Read the frames that ``choose`` picks, and the sound if ``sample_rate`` (Hz) is given.

    Raises BadSample; what ``choose`` raises comes through.
    """
    if source.kind in ("image", "arrow"):
        image = (
            arrow_image(source.path, source.offset, official=source.official)
            if source.kind == "arrow"
            else open_rgb(source.path, source.official)
        )
        return Clip(np.asarray(image)[None], np.zeros(1), np.zeros(0, np.float32), False)
    wave = None
    if source.kind == "frames":
        frames, times = _from_folder(source, choose)
    else:
        with VideoReader(_open(source), name=source.path) as video:
            first, count = _range(source, video.times)
            numbers = first + choose(count)
            frames, times = video.read(numbers), video.times[numbers]
            if sample_rate and not source.sound:
                wave = video.read_audio(sample_rate)
    if sample_rate and source.sound:
        wave = read_sound(source.sound, sample_rate)
    valid = wave is not None and len(wave) > 0
    return Clip(frames, times, wave if valid else np.zeros(0, np.float32), valid)


class ClipReader:
    """:func:`read_clip` that keeps whole decoded clips in memory, for small sets that are visited often.

    Args:
        keep_megabytes: of clips that are kept, in each worker; 0 keeps none.
        sample_rate: Hz of the sound, None for clips without it.
        shrink: applied to the frames of clips that are kept.
    """

    def __init__(
        self,
        keep_megabytes: int = 0,
        sample_rate: int | None = None,
        shrink: Callable[[NDArray[np.uint8]], NDArray[np.uint8]] | None = None,
    ):
        self.limit, self.sample_rate, self.shrink = keep_megabytes * 2**20, sample_rate, shrink
        self.clips: dict[ClipSource, Clip] = {}
        self.used = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "clips": {}, "used": 0}  # a spawned worker reads its own

    def __call__(self, source: ClipSource, choose: Choose) -> Clip:
        if source.kind in ("image", "arrow") or (self.used >= self.limit and source not in self.clips):
            return read_clip(source, choose, self.sample_rate)
        clip = self.clips.get(source)
        if clip is None:
            clip = read_clip(source, np.arange, self.sample_rate)
            clip = clip if self.shrink is None else clip._replace(frames=self.shrink(clip.frames))
            size = clip.frames.nbytes + clip.audio.nbytes
            if self.used + size <= self.limit:
                self.clips[source], self.used = clip, self.used + size
        numbers = choose(len(clip.frames))
        return clip._replace(frames=clip.frames[numbers], times=clip.times[numbers])


def _open(source: ClipSource) -> str | io.BytesIO:
    if source.kind == "video":
        path = Path(source.path)
        if path.is_file():
            return str(path)
        matches = sorted(p for p in path.parent.glob(f"{glob.escape(path.name)}.*") if p.suffix.lower() in VIDEO_SUFFIXES)
        return str(matches[0] if matches else path)
    if source.size > LARGEST_MEMBER:
        raise BadSample(f"video too large: {source.size} bytes at {source.offset} of {source.path}")
    try:
        with open(source.path, "rb") as file:
            file.seek(source.offset)
            return io.BytesIO(file.read(source.size))
    except OSError as error:
        raise BadSample(f"missing video: {source.path} ({error})") from error


def _range(source: ClipSource, times: NDArray[np.float64]) -> tuple[int, int]:
    """First frame and number of frames of the clip, cut to what there is. Raises BadSample if nothing is left."""
    first, last = 0, len(times)
    if source.span is not None:
        start, end = source.span
        first = max(int(np.searchsorted(times, start + 1e-6, side="right")) - 1, 0)
        last = int(np.searchsorted(times, end - 1e-6, side="left"))
        if times[-1] < start - 1:
            raise BadSample(f"too short: {source.path} ends before {start:g} s")
        last = max(last, first + 1)
    elif source.range is not None:
        first, last = source.range[0], sum(source.range)
    first = max(first, 0)
    if first >= len(times) or last <= first:
        raise BadSample(f"too short: {source.path} has {len(times)} frames and ends before frame {first + 1}")
    return first, min(last, len(times)) - first


def _from_folder(source: ClipSource, choose: Choose) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    rate = source.fps or 1.0
    if source.pattern:  # the number of frames is the list's
        first, count = source.range or (0, 0)
        numbers = first + choose(count)
        files = [Path(source.path, source.pattern.format(number + 1)) for number in numbers.tolist()]
    else:
        listed = _frame_files(Path(source.path))
        first, count = _range(source, np.arange(len(listed)) / rate)
        numbers = first + choose(count)
        files = [listed[number] for number in numbers.tolist()]
    images = [np.asarray(open_rgb(file, source.official)) for file in files]
    if len({image.shape for image in images}) > 1:
        raise BadSample(f"broken video: the frames in {source.path} are of different sizes")
    return np.stack(images), numbers / rate


def _frame_files(folder: Path) -> list[Path]:
    try:
        files = [p for p in folder.iterdir() if p.suffix.lower() in FRAME_SUFFIXES and not p.name.startswith(".")]
    except (OSError, ValueError) as error:
        raise BadSample(f"missing video: {folder} is no folder of frames ({error})") from error
    if not files:
        raise BadSample(f"missing video: {folder} holds no frames ({', '.join(FRAME_SUFFIXES)})")
    # Numbers are compared as numbers; the pairs keep letters and numbers comparable.
    return sorted(
        files, key=lambda path: [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", path.stem)]
    )
