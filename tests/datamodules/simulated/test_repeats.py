"""Simulated clips and sounds are the same bytes whenever and wherever they are written."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from datamodules.readers.video import write_mp4
from datamodules.simulated.audio_visual import make_video, render, sound, write_audio_visual
from datamodules.simulated.clips import make_clip, write_clips


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("write", [write_clips, write_audio_visual])
def test_a_set_that_is_written_again_is_the_same(tmp_path, write):
    sizes = {"train": 8, "val": 2, "test": 6}
    first, second = (digest(write(str(tmp_path / name), **sizes)) for name in "ab")
    assert first == second and any(name.endswith("mp4") for name in first)


def test_memory_that_was_used_before_leaves_no_trace(tmp_path):
    rng = np.random.default_rng(0)
    for index in range(12):
        frames = make_clip(0, index, 12, 40)[1]
        video = make_video(0, index)
        films = (frames, None), (render(0, index, video, 48, 3), sound(0, index, video))
        for pixels, wave in films:
            written = set()
            for _ in range(4):
                write_mp4(tmp_path / "x.mp4", pixels, 6, wave, 8000)
                written.add((tmp_path / "x.mp4").read_bytes())
                [rng.random(int(size)) for size in rng.integers(1000, 200_000, 5)]  # other garbage in freed memory
            assert len(written) == 1, index
