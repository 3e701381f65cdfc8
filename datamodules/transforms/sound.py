"""Which piece of a sound belongs to a frame (AdaMML)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def cut_clip(wave: NDArray[np.float32], centre: float, length: float, sample_rate: int) -> NDArray[np.float32]:
    """(n,) samples of ``length`` seconds around ``centre`` (seconds) of a sound (AdaMML, load_sound).

    At a border the clip is moved inside; a sound shorter than a clip is repeated, never padded with silence.
    """
    count, duration = round(length * sample_rate), len(wave) / sample_rate
    left, right = centre - length / 2, centre + length / 2
    if left < 0:
        clip = wave[:count]
    elif right > duration:
        clip = wave[-count:]
    else:
        clip = wave[round(left * sample_rate) : round(right * sample_rate)]
    if len(clip) < count:
        if not len(clip):
            raise ValueError("an empty sound track has no clips")
        clip = np.tile(clip, math.floor(count / len(clip) + 0.5) + 1)
    return clip[:count]
