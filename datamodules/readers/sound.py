"""Sound files (wav and whatever else the codecs know) through PyAV, mono and at any rate."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray


class SoundError(ValueError):
    """A file cannot be decoded as sound."""


def read_sound(path: str | Path, sample_rate: int) -> NDArray[np.float32]:
    """(n,) float32 in [-1, 1], mono, resampled to ``sample_rate`` Hz. Raises SoundError."""
    try:
        with av.open(str(path)) as container:
            resampler = av.AudioResampler(format="flt", layout="mono", rate=sample_rate)
            parts = [out.to_ndarray()[0] for frame in [*container.decode(audio=0), None] for out in resampler.resample(frame)]
    except (av.FFmpegError, IndexError, OSError) as error:
        raise SoundError(f"{path} is not readable sound ({error})") from error
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
