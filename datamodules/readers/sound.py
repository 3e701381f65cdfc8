"""Sound of any file that the codecs know, through PyAV: mono, at any rate."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

from datamodules.readers.base import BadSample

LONGEST = 6 * 3600  # seconds of sound that are read


def read_sound(path: str | Path, sample_rate: int) -> NDArray[np.float32]:
    """(n,) float32 in [-1, 1] from the file's first sample on. Raises BadSample."""
    try:
        with av.open(str(path)) as container:
            return decode_sound(container, sample_rate)[0]
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample(f"broken sound: {path} cannot be decoded ({error})") from error


def decode_sound(container: InputContainer, sample_rate: int) -> tuple[NDArray[np.float32], float]:
    """The whole first sound track, resampled, and the time of its first sample in seconds of the container's clock.

    Raises BadSample where it is too long or of an unknown codec, and whatever the decoder raises.
    """
    if container.streams.audio[0].codec_context is None:  # decoding would crash the process
        raise BadSample("broken sound: of an unknown codec")
    resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
    parts, start, count = [], None, 0
    for frame in container.decode(audio=0):
        start = float(frame.time or 0.0) if start is None else start
        parts += [out.to_ndarray()[0] for out in resampler.resample(frame)]
        count += frame.samples
        if count > LONGEST * frame.sample_rate:
            raise BadSample(f"sound too long: more than {LONGEST} seconds")
    if start is not None:
        parts += [out.to_ndarray()[0] for out in resampler.resample(None)]
    return (np.concatenate(parts) if parts else np.zeros(0, np.float32)), start or 0.0
