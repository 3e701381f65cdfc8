"""Narrated videos for pre-training: the text belongs to a moment, which is drawn anew at every visit."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np

from datamodules.readers.base import BadSample, inside
from datamodules.readers.clip import ClipSource
from datamodules.readers.text import csv_rows, read_json
from datamodules.readers.video_annotations.sample import (
    Annotations,
    Sample,
    choose,
    collect,
    metadata,
    named_rows,
    video,
)
from models.errors import UserError

LONGEST = 10**6  # seconds of a video
SHORTEST = 4.0  # seconds: HowTo100M's shorter narrations are widened to it
CLIP_SECONDS = 1.5  # of HowTo100M: three frames at two per second
WINDOW = (10.0, 15.0)  # seconds of a YT-Temporal clip


class HowToSample(Sample):
    """``texts[0]`` is the file of the narrations (columns start, end, text)."""

    def draw(self, rng: np.random.Generator | None) -> tuple[str, ClipSource]:
        """A narration, and a clip of CLIP_SECONDS from a random second of it on; without ``rng`` the first from its start.

        Raises BadSample where there is no narration.
        """
        try:
            rows = [row for _, row in csv_rows(self.texts[0], ("start", "end", "text")) if row["text"]]
            row = rows[0 if rng is None else int(rng.integers(len(rows)))]
            start, end = float(row["start"]), float(row["end"])
            if not 0 <= start <= end < LONGEST:
                raise ValueError(f"from {start} to {end} s")
        except (UserError, ValueError, IndexError, KeyError, TypeError) as error:
            raise BadSample(f"no narration: {self.texts[0]} ({error})") from error
        if end - start < SHORTEST:
            start = max(0.0, (start + end - SHORTEST) / 2)
            end = start + SHORTEST
        if rng is not None:
            start += int(rng.integers(max(int(end - start - CLIP_SECONDS), 0) + 1))
        return row["text"], self.source._replace(span=(start, start + CLIP_SECONDS))


class SpokenSample(Sample):
    """``texts[0]`` is the video's annotation: duration, spoken words with their times, and the cleaned transcript."""

    def draw(self, rng: np.random.Generator | None) -> tuple[str, ClipSource]:
        """A window of 10 to 15 seconds and what is said in it; without ``rng`` the first 10.

        Raises BadSample if nothing is said.
        """
        try:
            record = read_json(self.texts[0])
            duration = float(record["info"]["duration"])
            words = [(str(entry["word"]), float(entry["time"])) for entry in record["subtitles"]]
            clean = " ".join(entry["cleanasr"] for entry in record.get("denoised", [])).split()
            if not 0 < duration < LONGEST:
                raise ValueError(f"a duration of {duration} s")
        except (UserError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise BadSample(f"no narration: {self.texts[0]} ({error})") from error
        length = WINDOW[0] if rng is None else rng.uniform(*WINDOW)
        start = 0.0 if rng is None else rng.uniform(0, max(duration - length, 0))
        spoken = [word for word, time in timed_words(words, clean) if start <= time < start + length]
        if not spoken:
            raise BadSample(f"no narration: nothing is said in {self.key} from {start:.0f} s to {start + length:.0f} s")
        return " ".join(spoken), self.source._replace(span=(start, min(start + length, duration)))


def timed_words(words: list[tuple[str, float]], clean: list[str]) -> list[tuple[str, float]]:
    """The cleaned words with the times of the spoken ones that they follow.

    Both lists are aligned by their longest common runs; a word without partner gets the time of the last one with a
    partner. (The official code aligns by dynamic time warping; times differ by single words.) Without cleaned words the spoken
    ones are returned.
    """
    if not clean:
        return words
    heard, written = ([word.lower().strip(".,?!") for word in part] for part in ([word for word, _ in words], clean))
    times = [float("nan")] * len(clean)
    for a, b, size in difflib.SequenceMatcher(None, heard, written, autojunk=False).get_matching_blocks():
        for i in range(size):
            times[b + i] = words[a + i][1]
    last, timed = words[0][1] if words else 0.0, []
    for word, time in zip(clean, times, strict=True):
        last = last if np.isnan(time) else time
        timed.append((word, last))
    return timed


def howto100m(root: str, split: str) -> Annotations:
    """HowTo100M: ``ht100_videos_split.csv``, ``ht100_videos_split_val.csv`` and one file of narrations per video."""
    (name,) = choose(split, {"train": ("ht100_videos_split",), "val": ("ht100_videos_split_val",)})

    def sample_of(row: dict[str, str]) -> Sample:
        path = row["Name"]
        narrations = inside(root, "howto100m", "howto100m_csv", f"{Path(path).stem}.csv")
        return HowToSample(path, video(root, "howto100m", path), (str(narrations),))

    return collect(named_rows(metadata(root, "howto100m") / f"{name}.csv", "\t", "Name"), sample_of)


def yttemporal(root: str, split: str) -> Annotations:
    """YT-Temporal: ``train_success_2000000.csv``, ``val_success.csv``; ``subset_k/data/<id>.mp4`` and its annotation."""
    (name,) = choose(split, {"train": ("train_success_2000000",), "val": ("val_success",)})
    folder = ("yttemporal", "videos")

    def sample_of(row: dict[str, str]) -> Sample:
        path = row["Name"]
        spoken = inside(root, *folder, str(Path(path).parent.parent / "annotations" / f"{Path(path).stem}.json"))
        return SpokenSample(path, video(root, *folder, path), (str(spoken),))

    return collect(named_rows(metadata(root, "yttemporal") / f"{name}.csv", "\t", "Name"), sample_of)
