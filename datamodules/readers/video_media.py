"""The frames and the sound of one row of a video list, whether they lie as pictures and a wav or as one video file."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from datamodules.readers.sound import SoundError, read_sound
from datamodules.readers.video import VideoError, VideoReader
from datamodules.readers.video_lists import Files, VideoRow

VIDEO_FILES = (".mp4", ".webm", ".mkv", ".avi")


class MediaError(ValueError):
    """``kind: details`` of what is missing or broken; datasets turn it into a :class:`~models.batch.Skipped`."""


class Pictures(NamedTuple):
    """``frames`` (T, H, W, 3) uint8 and their ``times`` (T,) in seconds."""

    frames: NDArray[np.uint8]
    times: NDArray[np.float64]


class Media:
    """Where the rows of a dataset are found below ``root``, looked for in this order:

    a folder of pictures (``files.folder``/path, 1-based numbers), then a video file (path or videos/path, with or without its
    extension). Sound is a wav (path.wav or audio/path.wav, or the path itself), else the video's own track.

    Args:
        frame_rate: frames per second at which pictures were extracted; a video file knows its own.
    """

    def __init__(self, root: Path, files: Files, frame_rate: float):
        self.root, self.files, self.frame_rate = root, files, frame_rate

    def count(self, row: VideoRow) -> int:
        """Frames to choose from: those of the list, or of the video file, whose rate need not be the list's."""
        if self._folder(row):
            return row.count
        with self._video(row) as video:
            count = video.frames if row.first == 1 else min(row.count, video.frames - row.first + 1)
        if count < 1:
            raise MediaError(f"short video: {row.path} ends before frame {row.first}")
        return count

    def read(self, row: VideoRow, numbers: NDArray[np.int64]) -> Pictures:
        """Frames ``numbers``, counted from 1 within the row. Raises MediaError."""
        numbers = numbers + row.first - 1
        folder = self._folder(row)
        if not folder:
            with self._video(row) as video:
                try:
                    return Pictures(*video.read(numbers - 1))
                except VideoError as error:
                    raise MediaError(f"broken video: {error}") from error
        try:
            frames = [np.asarray(Image.open(folder / self.files.image.format(n)).convert("RGB")) for n in numbers]
        except FileNotFoundError as error:
            raise MediaError(f"missing frame: {error.filename}") from error
        except (UnidentifiedImageError, OSError) as error:
            raise MediaError(f"broken frame: {error}") from error
        return Pictures(np.stack(frames), (numbers - 1) / self.frame_rate)

    def sound(self, row: VideoRow, sample_rate: int) -> NDArray[np.float32] | None:
        """(n,) of the whole sound, from the time 0 of the frames on; None where there is none. Raises MediaError."""
        stem = self.root / row.path
        for path in (stem, stem.with_name(f"{stem.name}.wav"), self.root / "audio" / f"{row.path}.wav"):
            if path.suffix == ".wav" and path.is_file():
                try:
                    wave = read_sound(path, sample_rate)
                except SoundError as error:
                    raise MediaError(f"broken sound: {error}") from error
                return wave if len(wave) else None
        if self._video_file(row) is None:
            return None
        with self._video(row) as video:
            try:
                wave = video.read_audio(sample_rate)
            except VideoError as error:
                raise MediaError(f"broken sound: {error}") from error
        return wave if wave is not None and len(wave) else None

    def _folder(self, row: VideoRow) -> Path | None:
        folder = self.root / self.files.folder / row.path
        return folder if folder.is_dir() else None

    def _video_file(self, row: VideoRow) -> Path | None:
        for base in (self.root / row.path, self.root / "videos" / row.path):
            for path in (base, *(base.with_name(base.name + end) for end in VIDEO_FILES)):
                if path.suffix in VIDEO_FILES and path.is_file():
                    return path
        return None

    def _video(self, row: VideoRow) -> VideoReader:
        path = self._video_file(row)
        if path is None:
            raise MediaError(
                f"missing video: neither {self.root / self.files.folder / row.path}/ nor a video file of that name"
            )
        try:
            return VideoReader(path)
        except VideoError as error:
            raise MediaError(f"broken video: {error}") from error
