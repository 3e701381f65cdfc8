"""Narrated videos for pre-training: the text belongs to a moment, which is drawn anew at every visit."""

from __future__ import annotations

import csv
import difflib
import json
from pathlib import Path

import numpy as np

from datamodules.readers.clips import Media
from datamodules.readers.video import VideoError
from datamodules.readers.video_annotations.sample import AnnotationError, Annotations, Sample, choose, existing, metadata

SHORTEST = 4.0  # seconds: HowTo100M's shorter narrations are widened to it
CLIP_SECONDS = 1.5  # of HowTo100M: three frames at two per second
WINDOW = (10.0, 15.0)  # seconds of a YT-Temporal clip


class HowToSample(Sample):
    """``texts[0]`` is the file of the narrations (columns start, end, text)."""

    def draw(self, rng: np.random.Generator | None) -> tuple[str, Media]:
        """A narration, and a clip of CLIP_SECONDS from a random second of it on; without ``rng`` the first from its start.

        Raises VideoError where there is no narration.
        """
        try:
            with open(self.texts[0], encoding="utf-8", newline="") as file:
                rows = [row for row in csv.DictReader(file) if row.get("text")]
            row = rows[0 if rng is None else int(rng.integers(len(rows)))]
            start, end = float(row["start"]), float(row["end"])
        except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
            raise VideoError(f"{self.texts[0]} holds no narration ({error!r})") from error
        if end - start < SHORTEST:
            start = max(0.0, (start + end - SHORTEST) / 2)
            end = start + SHORTEST
        if rng is not None:
            start += int(rng.integers(max(int(end - start - CLIP_SECONDS), 0) + 1))
        return row["text"], self.media._replace(span=(start, start + CLIP_SECONDS))


class SpokenSample(Sample):
    """``texts[0]`` is the video's annotation: duration, spoken words with their times, and the cleaned transcript."""

    def draw(self, rng: np.random.Generator | None) -> tuple[str, Media]:
        """A window of 10 to 15 seconds and what is said in it; without ``rng`` the first 10.

        Raises VideoError if nothing is said.
        """
        try:
            record = json.loads(Path(self.texts[0]).read_text(encoding="utf-8"))
            duration = float(record["info"]["duration"])
            words = [(entry["word"], float(entry["time"])) for entry in record["subtitles"]]
            clean = " ".join(entry["cleanasr"] for entry in record.get("denoised", [])).split()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise VideoError(f"{self.texts[0]} is no annotation of YT-Temporal ({error!r})") from error
        length = WINDOW[0] if rng is None else rng.uniform(*WINDOW)
        start = 0.0 if rng is None else rng.uniform(0, max(duration - length, 0))
        spoken = [word for word, time in timed_words(words, clean) if start <= time < start + length]
        if not spoken:
            raise VideoError(f"nothing is said in {self.key} from {start:.0f} s to {start + length:.0f} s")
        return " ".join(spoken), self.media._replace(span=(start, min(start + length, duration)))


def timed_words(words: list[tuple[str, float]], clean: list[str]) -> list[tuple[str, float]]:
    """The cleaned words with the times of the spoken ones that they follow.

    Both lists are aligned by their longest common runs; a word without partner gets the time of the last one with a
    partner. (The official code aligns by dynamic time warping; times differ by single words.) Without cleaned words the spoken
    ones are returned.
    """
    if not clean:
        return words
    plain = [[word.lower().strip(".,?!") for word in part] for part in ([word for word, _ in words], clean)]
    times = [float("nan")] * len(clean)
    for a, b, size in difflib.SequenceMatcher(None, *plain, autojunk=False).get_matching_blocks():
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
    folder = Path(root, "howto100m")
    samples = []
    for path in _names(metadata(root, "howto100m") / f"{name}.csv"):
        narrations = folder / "howto100m_csv" / f"{Path(path).stem}.csv"
        samples.append(HowToSample(path, Media(str(folder / path)), (str(narrations),)))
    return Annotations(samples)


def yttemporal(root: str, split: str) -> Annotations:
    """YT-Temporal: ``train_success_2000000.csv``, ``val_success.csv``; ``subset_k/data/<id>.mp4`` and its annotation."""
    (name,) = choose(split, {"train": ("train_success_2000000",), "val": ("val_success",)})
    folder = Path(root, "yttemporal", "videos")
    samples = []
    for path in _names(metadata(root, "yttemporal") / f"{name}.csv"):
        spoken = folder / Path(path).parent.parent / "annotations" / f"{Path(path).stem}.json"
        samples.append(SpokenSample(path, Media(str(folder / path)), (str(spoken),)))
    return Annotations(samples)


def _names(path: Path) -> list[str]:
    """The column ``Name`` of a tab-separated file."""
    with existing(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        if "Name" not in (reader.fieldnames or []):
            raise AnnotationError(f"{path} has no column 'Name', but {reader.fieldnames}")
        return [row["Name"] for row in reader]
