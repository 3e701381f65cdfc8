"""Official annotation formats of action recognition: a fixed prompt for every clip, and a class."""

from __future__ import annotations

from pathlib import Path

from datamodules.readers.clips import Media
from datamodules.readers.video_annotations.sample import Annotations, Sample, choose, existing, metadata, table

HMDB51_PROMPT = "A person is doing [MASK]"
K400_PROMPT = "A persion is doing [MASK]"  # sic: what the released classifiers were trained with


def hmdb51(root: str, split: str) -> Annotations:
    """HMDB51, split 1: ``hmdb51_rgb_{train,val}_split_1.txt`` (path, frames, label), names in ``hmdb51_classInd.txt``."""
    (part,) = choose(split, {"train": ("train",), "test": ("val",)})
    folder = metadata(root, "hmdb51")
    names = _class_names(folder / "hmdb51_classInd.txt")
    samples = []
    for line in existing(folder / f"hmdb51_rgb_{part}_split_1.txt").read_text().splitlines():
        if line.strip():
            path, _, label = line.rsplit(" ", 2)
            media = Media(str(Path(root, "hmdb51", f"{Path(path).name}.avi")))
            samples.append(Sample(path, media, (HMDB51_PROMPT,), int(label)))
    return Annotations(samples, names)


def k400(root: str, split: str) -> Annotations:
    """Kinetics-400: ``k400_{train,test}_tsm.list`` (path on the authors' cluster, label), ``kinetics_label_map.txt``.

    Class and file are what follows character 46 (train) or 44 (test) of the path, minus its suffix, which
    is looked up when the clip is read.
    """
    (start, folder, listed) = choose(split, {"train": (46, "train", "train"), "test": (44, "val", "test")})
    meta = metadata(root, "k400")
    names = tuple(line.strip() for line in existing(meta / "kinetics_label_map.txt").read_text().splitlines() if line.strip())
    samples = []
    for row in table(meta / f"k400_{listed}_tsm.list", 2):
        inside = Path(row[0][start:]).with_suffix("")
        samples.append(Sample(str(inside), Media(str(Path(root, "k400", folder, inside))), (K400_PROMPT,), int(row[1])))
    return Annotations(samples, names)


def _class_names(path: Path) -> tuple[str, ...]:
    """``<number> <name>`` per line, numbers from 1."""
    lines = (line.split(maxsplit=1) for line in existing(path).read_text().splitlines() if line.strip())
    return tuple(name for _, name in sorted((int(number), name.strip()) for number, name in lines))
