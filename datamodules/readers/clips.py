"""One way to read a clip, whatever it lies in: a video file, a folder of frames, a picture, bytes of a tar or arrow file."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from datamodules.readers.arrow_images import arrow_picture
from datamodules.readers.video import VideoError, VideoReader

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class Media(NamedTuple):
    """Where a clip lies.

    ``kind``: ``video`` (any file PyAV decodes: mp4, webm, avi, gif), ``frames`` (a folder of numbered pictures), ``image``
    (one picture), ``tar`` (a member of an uncompressed tar at ``offset``, ``size`` bytes long, itself a video), ``arrow`` (the
    picture in row ``offset`` of an Arrow file).
    ``span``: (start, end) in seconds, None: the whole. ``fps``: of a folder of frames. ``window``: (centre, width) in frames.
    """

    path: str
    kind: Literal["video", "frames", "image", "tar", "arrow"] = "video"
    span: tuple[float, float] | None = None
    fps: float = 0.0
    window: tuple[int, int] | None = None
    offset: int = 0
    size: int = 0


class FrameRange(NamedTuple):
    """Which frames of the medium belong to the clip: ``first``, and how many."""

    first: int
    count: int


Choose = Callable[[int], NDArray[np.int64]]  # frames there are -> frame numbers


def read_clip(media: Media, choose: Choose) -> NDArray[np.uint8]:
    """Frames (T, H, W, 3) RGB of the numbers that ``choose`` gives within the clip's range.

    Raises VideoError for what cannot be read; what ``choose`` raises comes through.
    """
    if media.kind == "image":
        return _picture(Path(media.path))[None]
    if media.kind == "arrow":
        return arrow_picture(media.path, media.offset)[None]
    if media.kind == "frames":
        return _from_folder(media, choose)
    with VideoReader(_source(media), name=media.path) as video:
        chosen = _range(media, video.frames, video.fps)
        return video.read(chosen.first + choose(chosen.count))[0]


def _source(media: Media) -> str | io.BytesIO:
    if media.kind == "video":
        path = Path(media.path)
        if not path.suffix:  # lists that name no suffix (Kinetics)
            path = next(iter(sorted(path.parent.glob(f"{path.name}.*"))), path)
        return str(path)
    try:
        with open(media.path, "rb") as file:
            file.seek(media.offset)
            return io.BytesIO(file.read(media.size))
    except OSError as error:
        raise VideoError(f"{media.path} cannot be opened ({error})") from error


def _range(media: Media, frames: int, fps: float) -> FrameRange:
    """The frames of a span or window, cut to what there is, at least one."""
    first, last = 0, frames
    if media.span is not None and fps:
        first, last = int(media.span[0] * fps), int(np.ceil(media.span[1] * fps))
    elif media.window is not None:
        centre, width = media.window
        first, last = centre - width // 2, centre + width // 2
    first = min(max(first, 0), frames - 1)
    return FrameRange(first, max(min(last, frames) - first, 1))


def _from_folder(media: Media, choose: Choose) -> NDArray[np.uint8]:
    try:
        files = [p for p in Path(media.path).iterdir() if p.suffix.lower() in FRAME_SUFFIXES]
    except OSError as error:
        raise VideoError(f"{media.path} is no folder of frames ({error})") from error
    if not files:
        raise VideoError(f"{media.path} holds no frames ({', '.join(FRAME_SUFFIXES)})")
    files.sort(key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.stem)])
    chosen = _range(media, len(files), media.fps)
    pictures = [_picture(files[i]) for i in (chosen.first + choose(chosen.count)).tolist()]
    if len({picture.shape for picture in pictures}) > 1:
        raise VideoError(f"the frames in {media.path} are of different sizes")
    return np.stack(pictures)


def _picture(path: Path) -> NDArray[np.uint8]:
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise VideoError(f"{path} cannot be read as a picture ({error})") from error
