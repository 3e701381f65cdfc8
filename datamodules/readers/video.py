"""Video files through PyAV, whose wheel carries its codecs: frames by number or time, and the sound track."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import av
import numpy as np
from numpy.typing import NDArray

# ffmpeg's default search for the best coding takes ten times as long and is not heard.
FAST_AAC = {"aac_coder": "fast"}


class VideoError(ValueError):
    """A file cannot be decoded as video; datasets turn it into a :class:`~models.batch.Skipped`."""


class VideoReader:
    """One open video, a path or an open binary file (whose ``name`` messages give); use as a context manager.

    Attributes:
        frames: number of frames (from the container, or counted where it does not say).
        fps: frames per second. duration: seconds. has_audio: whether there is a sound track.

    Raises VideoError when the file is no video or its header is damaged.
    """

    def __init__(self, source: str | Path | BinaryIO, name: str = "a video in memory"):
        in_memory = hasattr(source, "read")
        self.path = Path(name) if in_memory else Path(source)
        try:
            self._container = av.open(source if in_memory else str(source))
            self._stream = self._container.streams.video[0]
        except (av.FFmpegError, IndexError, OSError) as error:
            raise VideoError(f"{self.path} is not a readable video ({error})") from error
        self._stream.thread_type = "NONE"  # the workers are the parallelism
        self.fps = float(self._stream.average_rate or 0)
        self.has_audio = bool(self._container.streams.audio)
        self._times: NDArray[np.float64] | None = None
        self.frames = int(self._stream.frames) or len(self._index())
        if not self.frames:
            self._container.close()
            raise VideoError(f"{self.path} holds no video frames")
        self.duration = self.frames / self.fps if self.fps else float(self._index()[-1])

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._container.close()

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
        """Frames (T, H, W, 3) RGB and their times (T,) in seconds, for frame numbers in any order, repeats allowed.

        Decodes from the last key frame before the first wanted frame to the last wanted one. Raises VideoError when the
        file ends or breaks before that.
        """
        indices = np.asarray(indices)
        wanted, last = set(indices.tolist()), int(indices.max())
        found: dict[int, tuple[NDArray[np.uint8], float]] = {}
        try:
            for number, frame in self._decode_from(int(indices.min())):
                if number in wanted:
                    found[number] = (frame.to_ndarray(format="rgb24"), float(frame.time or 0.0))
                if number >= last:
                    break
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"{self.path} breaks off after {len(found)} of {len(wanted)} wanted frames ({error})") from error
        if len(found) < len(wanted):
            raise VideoError(f"{self.path} ends early: frames {sorted(wanted - found.keys())[:4]} are missing")
        return np.stack([found[i][0] for i in indices.tolist()]), np.array([found[i][1] for i in indices.tolist()])

    def read_audio(self, sample_rate: int) -> NDArray[np.float32] | None:
        """The whole sound track, mono, resampled: (n,) float32 in [-1, 1]; None without one. Raises VideoError."""
        if not self.has_audio:
            return None
        try:
            self._container.seek(0)
            resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
            parts = [
                out.to_ndarray()[0] for frame in [*self._container.decode(audio=0), None] for out in resampler.resample(frame)
            ]
        except (av.FFmpegError, OSError) as error:
            raise VideoError(f"the sound of {self.path} cannot be decoded ({error})") from error
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _decode_from(self, first: int):
        """(frame number, frame) from the key frame at or before ``first`` on."""
        start = float(self._stream.start_time or 0) * float(self._stream.time_base)
        if first and self.fps:
            self._container.seek(int((start + first / self.fps) / self._stream.time_base), stream=self._stream)
        else:
            self._container.seek(0)
        for frame in self._container.decode(self._stream):
            yield round((float(frame.time or 0.0) - start) * self.fps), frame

    def _index(self) -> NDArray[np.float64]:
        """Times of all frames, by reading (not decoding) the packets."""
        if self._times is None:
            times = [float(p.pts * p.time_base) for p in self._container.demux(self._stream) if p.pts is not None]
            self._times = np.sort(np.array(times))
        return self._times


def write_mp4(
    path: str | Path,
    frames: NDArray[np.uint8],
    fps: int,
    audio: NDArray[np.float32] | None = None,
    sample_rate: int = 16000,
    quality: int = 18,
) -> None:
    """Write frames (T, H, W, 3) uint8 RGB, sides even, as H.264 in mp4, with an AAC track where ``audio`` (n,) is given."""
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=fps, options={"crf": str(quality), "preset": "veryfast", "threads": "1"})
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
