"""Video files through PyAV, whose wheel carries its codecs: frames by their order, and the sound track."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import av
import numpy as np
from numpy.typing import NDArray

from datamodules.readers.base import BadSample
from datamodules.readers.images import MAX_PIXELS
from datamodules.readers.sound import decode_sound

# ffmpeg's default search for the best coding takes ten times as long and is not heard.
FAST_AAC = {"aac_coder": "fast"}
# One thread, and no macroblock tree: x264's assembly for it reads beyond small frames, so that 3 clips of 10 came out
# differently each time.
REPEATABLE_H264 = {"preset": "veryfast", "threads": "1", "x264-params": "mbtree=0"}
ERRORS = (av.FFmpegError, OSError, ValueError, IndexError)  # what PyAV raises for damaged files


class VideoReader:
    """One open video; use as a context manager.

    Frames are numbered in the order in which they are shown, from 0, whatever their times: a clip that was cut without
    re-encoding begins with its own first frame, and a pause or a change of the frame rate moves no number. Frames of phones
    are turned upright.

    Args:
        source: path, or open binary file.
        name: what messages call a binary file.

    Attributes:
        times: (frames,) seconds of each frame after the first one.

    Raises:
        BadSample: "missing video" or "broken video".
    """

    def __init__(self, source: str | Path | BinaryIO, name: str = "a video in memory"):
        self._source: Any = source
        self._container: Any = None
        self.name = name if hasattr(source, "read") else str(source)
        try:
            self._open()
            self._index()
        except ERRORS as error:
            self._close()
            kind = "missing video" if isinstance(error, FileNotFoundError) else "broken video"
            raise error if isinstance(error, BadSample) else BadSample(f"{kind}: {self.name} ({error})") from error

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._close()

    @property
    def frames(self) -> int:
        return len(self.times)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Frames (T, H, W, 3) RGB of the numbers, in any order, repeats allowed.

        Decodes from the last key frame before the first number to the last number. Raises BadSample when the file ends or
        breaks before that.
        """
        numbers = set(np.asarray(indices).tolist())
        images = self._decode(numbers, from_key_frame=True) if self._pts is not None and min(numbers) else {}
        if len(images) < len(numbers):  # streams without an index (MPEG-TS) cannot be entered in the middle
            images = self._decode(numbers, from_key_frame=False)
        if missing := sorted(numbers - images.keys()):
            raise BadSample(f"broken video: {self.name} ends or breaks off before frame {missing[0]} of {self.frames}")
        if len({image.shape for image in images.values()}) > 1:
            raise BadSample(f"broken video: the frames of {self.name} are of different sizes")
        return np.stack([images[i] for i in np.asarray(indices).tolist()])

    def read_audio(self, sample_rate: int) -> NDArray[np.float32] | None:
        """The sound from the time of the first frame on, mono: (n,) float32 in [-1, 1]; None without sound.

        Raises BadSample.
        """
        if not self._container.streams.audio:
            return None
        try:
            self._open()
            wave, start = decode_sound(self._container, sample_rate)
        except ERRORS as error:
            if isinstance(error, BadSample):
                raise
            raise BadSample(f"broken sound: of {self.name} ({error})") from error
        late = round((start - self._start) * sample_rate)
        wave = np.concatenate([np.zeros(late, np.float32), wave]) if late > 0 else wave[-late:]
        return wave if len(wave) else None

    def _open(self) -> None:
        """Open at the beginning, anew where it is open: not every format can be rewound."""
        self._close()
        if hasattr(self._source, "read"):
            self._source.seek(0)
        self._container = av.open(self._source if hasattr(self._source, "read") else str(self._source))
        self._stream = self._container.streams.video[0]
        if self._stream.codec_context is None:  # decoding would crash the process
            raise BadSample(f"broken video: {self.name} is of an unknown codec")
        self._stream.thread_type = "NONE"  # the workers are the parallelism
        width, height = self._stream.codec_context.width, self._stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise BadSample(f"image too large: frames of {width} x {height} pixels in {self.name}")

    def _close(self) -> None:
        if getattr(self, "_container", None) is not None:
            self._container.close()
            self._container = None

    def _index(self) -> None:
        """``_pts``: (frames,) presentation times in the order of the frames, None where the file has none. ``_keys``: those of
        key frames. ``_start``: seconds of the first frame on the container's clock."""
        base = float(self._stream.time_base or 0)
        self._pts = self._constant_rate()
        self._keys = None
        # AVI knows the order of decoding alone, which B frames make another one than that of showing.
        by_order = self._container.format.name == "avi" and self._stream.codec_context.has_b_frames
        if self._pts is None and not by_order:
            packets = [p for p in self._container.demux(self._stream) if p.size and not p.is_discard]
            first = next((i for i, packet in enumerate(packets) if packet.is_keyframe), 0)
            packets = packets[first:]  # what comes before a key frame cannot be decoded
            if packets and all(packet.pts is not None for packet in packets):
                self._pts = np.unique([packet.pts for packet in packets])
                self._keys = np.sort([packet.pts for packet in packets if packet.is_keyframe])
            self._open()
        if self._pts is not None:
            self._start = float(self._pts[0]) * base
            self.times = (self._pts - self._pts[0]) * base
        else:
            count = sum(1 for _ in self._container.decode(self._stream))
            self._start = 0.0
            self.times = np.arange(count) / float(self._stream.average_rate or 25)
        if not len(self.times):
            raise BadSample(f"broken video: {self.name} holds no video frames")

    def _constant_rate(self) -> NDArray[np.int64] | None:
        """Presentation times from the header alone, where it says that frames follow each other evenly; else None."""
        stream, entries = self._stream, []
        if "mov" in self._container.format.name and stream.frames:
            entries = list(stream.index_entries)
        steps = np.unique(np.diff([entry.timestamp for entry in entries]))
        if len(entries) != stream.frames or len(steps) != 1 or stream.start_time is None:
            return None
        if any(entry.is_discard for entry in entries):  # an edit list hides some of them
            return None
        return stream.start_time + np.arange(len(entries)) * int(steps[0])

    def _decode(self, numbers: set[int], from_key_frame: bool) -> dict[int, NDArray[np.uint8]]:
        """Frames by number, as many as can be decoded."""
        images: dict[int, NDArray[np.uint8]] = {}
        last = max(numbers)
        try:
            if from_key_frame:
                self._container.seek(int(self._seek_to(min(numbers))), stream=self._stream)
            else:
                self._open()
            for number, frame in self._numbered():
                if number in numbers and number not in images:
                    images[number] = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
                if number >= last and len(images) == len(numbers):
                    break
                if number > last + 32:  # further than any codec reorders
                    break
        except ERRORS:
            pass  # what is missing is reported by the caller
        return images

    def _seek_to(self, number: int) -> int:
        if self._keys is None:
            return self._pts[number]
        place = int(np.searchsorted(self._keys, self._pts[number], side="right")) - 1
        return self._keys[max(place, 0)]

    def _numbered(self) -> Iterator[tuple[int, av.VideoFrame]]:
        step = float(np.median(np.diff(self._pts))) if self._pts is not None and len(self._pts) > 1 else 1.0
        for position, frame in enumerate(self._container.decode(self._stream)):
            if self._pts is None:
                yield position, frame
            elif frame.pts is not None:
                number = int(np.argmin(np.abs(self._pts - frame.pts))) if len(self._pts) < 2 else self._nearest(frame.pts)
                if abs(self._pts[number] - frame.pts) <= step / 2:
                    yield number, frame

    def _nearest(self, pts: int) -> int:
        after = min(int(np.searchsorted(self._pts, pts)), len(self._pts) - 1)
        before = max(after - 1, 0)
        return after if abs(self._pts[after] - pts) <= abs(self._pts[before] - pts) else before


def write_mp4(
    path: str | Path,
    frames: NDArray[np.uint8],
    fps: int,
    audio: NDArray[np.float32] | None = None,
    sample_rate: int = 16000,
    quality: int = 18,
) -> None:
    """Write frames (T, H, W, 3) uint8 RGB, sides even, as H.264 in mp4, with an AAC track where ``audio`` (n,) is given.

    The same arguments give the same bytes, on any number of cores.
    """
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps, options={**REPEATABLE_H264, "crf": str(quality)})
        video.height, video.width, video.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        sound = container.add_stream("aac", rate=sample_rate, layout="mono", options=FAST_AAC) if audio is not None else None
        for image in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")))
        container.mux(video.encode())
        if sound is not None:
            for start in range(0, len(audio), 1024):
                chunk = av.AudioFrame.from_ndarray(
                    np.ascontiguousarray(audio[None, start : start + 1024], dtype=np.float32), format="fltp", layout="mono"
                )
                chunk.sample_rate, chunk.pts = sample_rate, start
                container.mux(sound.encode(chunk))
            container.mux(sound.encode())
