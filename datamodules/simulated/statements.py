"""Sentences about simulated scenes, in the files of SNLI-VE and of NLVR2.

A hypothesis about a scene is entailed, contradicted, or neutral: it names what the image does not show. A sentence about two
scenes says how many shapes of a colour both have together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.simulated.questions import COLOURS, make_question_scene
from datamodules.simulated.scenes import Scene, render
from datamodules.simulated.worlds import SPLIT_STARTS
from datamodules.tokenizers.base import BERT_SPECIALS
from models.io import atomic_directory, stable_hash

WORLD = 1  # raise it when the same arguments would give other scenes or sentences

FILES = {"train": ("train", "train"), "val": ("dev", "dev"), "test": ("test", "test1")}  # of SNLI-VE, of NLVR2
UNSEEN = ("is heavy", "was drawn by a child", "is old", "costs a lot")


def hypotheses(scene: Scene) -> list[tuple[str, str]]:
    """(sentence, label): one of each label."""
    rng = np.random.default_rng(scene.phrasing)
    thing = scene.things[rng.integers(len(scene.things))]
    wrong = COLOURS[(COLOURS.index(thing.colour) + int(rng.integers(1, len(COLOURS)))) % len(COLOURS)]
    unseen = UNSEEN[rng.integers(len(UNSEEN))]
    return [
        (f"the {thing.shape} is {thing.colour}", "entailment"),
        (f"the {thing.shape} is {wrong}", "contradiction"),
        (f"the {thing.shape} {unseen}", "neutral"),
    ]


def pair_sentences(left: Scene, right: Scene) -> list[tuple[str, str]]:
    """(sentence, label): a true and a false one."""
    rng = np.random.default_rng((left.phrasing, right.phrasing))
    count = len(left.things) + len(right.things)
    wrong = count + (1 if rng.random() < 0.5 else -1)
    return [(f"there are {count} shapes in all", "True"), (f"there are {wrong} shapes in all", "False")]


def write_statements(
    root: str, train: int = 1000, val: int = 100, test: int = 200, image_size: int = 32, seed: int = 0
) -> Path:
    """The folder with the simulated set of these arguments, written unless it is there already.

    Args:
        root: the set is ``root/statements_<hash of the arguments>`` and appears whole or not at all.
        train: number of scenes, and of pairs of scenes.
        val: likewise.
        test: likewise.
        image_size: side of the square images in pixels.
        seed: of the world.
    """
    sizes = {"train": train, "val": val, "test": test}
    folder = Path(root, f"statements_{stable_hash([WORLD, sizes, image_size, seed])}")
    if folder.is_dir():
        return folder
    with atomic_directory(folder) as temporary:
        for name in ("flickr30k_images", "data", "images"):
            (temporary / name).mkdir()
        words: set[str] = set()
        for split, count in sizes.items():
            scenes = [make_question_scene(seed, SPLIT_STARTS[split] + number) for number in range(count + 1)]
            words |= _write_snli(temporary, split, scenes[:count], image_size)
            words |= _write_nlvr2(temporary, split, scenes, image_size)
        (temporary / "vocab.txt").write_text("\n".join([*BERT_SPECIALS, *sorted(words)]) + "\n")
    return folder


def _write_snli(folder: Path, split: str, scenes: list[Scene], image_size: int) -> set[str]:
    lines: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        name = f"{SPLIT_STARTS[split] + number}"
        render(scene, image_size).save(folder / "flickr30k_images" / f"{name}.jpg", "JPEG", quality=95, subsampling=0)
        for sentence, label in hypotheses(scene):
            lines.append({"Flickr30K_ID": name, "sentence1": "", "sentence2": sentence, "gold_label": label})
    (folder / f"snli_ve_{FILES[split][0]}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {word for line in lines for word in line["sentence2"].split()}


def _write_nlvr2(folder: Path, split: str, scenes: list[Scene], image_size: int) -> set[str]:
    part = FILES[split][1]
    place = folder / "images" / part / "0" if part == "train" else folder / "images" / part
    place.mkdir(parents=True)
    lines: list[dict[str, Any]] = []
    for number, pair in enumerate(zip(scenes[:-1], scenes[1:], strict=True)):
        for i, scene in enumerate(pair):
            render(scene, image_size).save(place / f"{part}-{number}-0-img{i}.png")
        for i, (sentence, label) in enumerate(pair_sentences(*pair)):
            lines.append({"identifier": f"{part}-{number}-0-{i}", "sentence": sentence, "label": label, "directory": 0})
    (folder / "data" / f"{part}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {word for line in lines for word in line["sentence"].split()}
