"""Official annotation formats of action recognition: a fixed prompt for every clip, and a class."""

from __future__ import annotations

from pathlib import Path

from datamodules.readers.video_annotations.sample import (
    AnnotationError,
    Annotations,
    Sample,
    choose,
    collect,
    lines,
    metadata,
    table,
    video,
)

HMDB51_PROMPT = "A person is doing [MASK]"
K400_PROMPT = "A persion is doing [MASK]"  # sic: what the released classifiers were trained with


def hmdb51(root: str, split: str) -> Annotations:
    """HMDB51, split 1: ``hmdb51_rgb_{train,val}_split_1.txt`` (path, frames, label), names in ``hmdb51_classInd.txt``."""
    (part,) = choose(split, {"train": ("train",), "test": ("val",)})
    folder = metadata(root, "hmdb51")

    def sample_of(line: str) -> Sample:
        path, _, label = line.rsplit(" ", 2)
        return Sample(path, video(root, "hmdb51", f"{Path(path).name}.avi"), (HMDB51_PROMPT,), int(label))

    names = _class_names(folder / "hmdb51_classInd.txt")
    return collect(lines(folder / f"hmdb51_rgb_{part}_split_1.txt"), sample_of, names)


def k400(root: str, split: str) -> Annotations:
    """Kinetics-400: ``k400_{train,test}_tsm.list`` (path on the authors' cluster, label), ``kinetics_label_map.txt``.

    Class and file are what follows character 46 (train) or 44 (test) of the path, minus its suffix, which
    is looked up when the clip is read.
    """
    (start, folder, listed) = choose(split, {"train": (46, "train", "train"), "test": (44, "val", "test")})
    meta = metadata(root, "k400")

    def sample_of(row: list[str]) -> Sample:
        clip = str(Path(row[0][start:]).with_suffix(""))
        return Sample(clip, video(root, "k400", folder, clip), (K400_PROMPT,), int(row[1]))

    names = tuple(line.strip() for _, line in lines(meta / "kinetics_label_map.txt"))
    return collect(table(meta / f"k400_{listed}_tsm.list", 2), sample_of, names)


def _class_names(path: Path) -> tuple[str, ...]:
    """``<number> <name>`` per line, numbers from 1. Raises AnnotationError."""
    names = {}
    for where, line in lines(path):
        number, _, name = line.strip().partition(" ")
        if not number.isdecimal() or not name.strip():
            raise AnnotationError(f"{where}: '{line[:80]}' is not '<number> <name>'.")
        names[int(number)] = name.strip()
    return tuple(name for _, name in sorted(names.items()))
