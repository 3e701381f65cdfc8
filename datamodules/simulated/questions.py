"""Scenes with questions and captions, in the files of VQAv2 and of Karpathy's COCO.

A scene has one to three coloured shapes, each in a quarter of the image, on a patterned ground. Questions ask for colours,
shapes, numbers, relations of place, and the fine texture of the ground. A scene is a pure function of (seed, index).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.simulated.scenes import GROUNDS, PATTERNS, Scene, Thing, render
from datamodules.simulated.worlds import SPLIT_STARTS
from datamodules.tokenizers.base import BERT_SPECIALS
from models.io import atomic_directory, stable_hash

WORLD = 1  # raise it when the same arguments would give other scenes, questions or captions

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "yellow", "green", "blue")
NUMBERS = ("1", "2", "3")
KINDS = ("colour", "shape", "count", "relation", "texture")
PARTS = {"train": "train2014", "val": "val2014", "test": "test2015"}
PEOPLE = 10  # who answer each question


class Question(NamedTuple):
    """A question, its answer and its kind."""

    text: str
    answer: str
    kind: str


def make_question_scene(seed: int, index: int) -> Scene:
    """Scene ``index`` of the world ``seed``: shapes and colours that occur once each."""
    rng = np.random.default_rng((seed, index, 7))
    count = int(rng.integers(1, 1 + len(NUMBERS)))
    places = rng.permutation(4)[:count]
    shapes, colours = rng.permutation(len(SHAPES))[:count], rng.permutation(len(COLOURS))[:count]
    things = []
    for place, shape, colour in zip(places.tolist(), shapes.tolist(), colours.tolist(), strict=True):
        x, y = (0.25 + 0.5 * (place % 2), 0.25 + 0.5 * (place // 2)) + rng.uniform(-0.02, 0.02, 2)
        radius, angle = rng.uniform(0.19, 0.23), rng.uniform(-0.1, 0.1)
        things.append(Thing(SHAPES[shape], COLOURS[colour], float(x), float(y), float(radius), float(angle)))
    ground, pattern = list(GROUNDS)[rng.integers(len(GROUNDS))], PATTERNS[rng.integers(len(PATTERNS))]
    tint = tuple(int(value) for value in rng.integers(-14, 15, 3))
    return Scene(tuple(things), ground, pattern, tint, int(rng.integers(2**31)))


def questions(scene: Scene) -> list[Question]:
    """One question of each kind that the scene allows."""
    rng = np.random.default_rng(scene.phrasing)
    asked = scene.things[rng.integers(len(scene.things))]
    out = [
        Question(f"what colour is the {asked.shape}?", asked.colour, "colour"),
        Question(f"what shape is {asked.colour}?", asked.shape, "shape"),
        Question("how many shapes are there?", NUMBERS[len(scene.things) - 1], "count"),
        Question("what pattern has the ground?", scene.pattern, "texture"),
    ]
    if len(scene.things) > 1:
        a, b = rng.permutation(len(scene.things))[:2]
        out.append(_relation_question(scene.things[a], scene.things[b], rng))
    return out


def captions(scene: Scene) -> list[str]:
    """Two captions in different words, which together name everything."""
    names = [f"{thing.name} {_place(thing)}" for thing in scene.things]
    return [f"{' and '.join(names)} on {scene.pattern}", f"{scene.pattern} with {' and '.join(reversed(names))}"]


def write_question_scenes(
    root: str, train: int = 2300, val: int = 150, test: int = 400, image_size: int = 32, seed: int = 0
) -> Path:
    """The folder with the simulated set of these arguments, written unless it is there already.

    Args:
        root: the set is ``root/questions_<hash of the arguments>`` and appears whole or not at all.
        train: number of scenes.
        val: likewise.
        test: likewise.
        image_size: side of the square JPEGs in pixels.
        seed: of the world.
    """
    sizes = {"train": train, "val": val, "test": test}
    folder = Path(root, f"questions_{stable_hash([WORLD, sizes, image_size, seed])}")
    if folder.is_dir():
        return folder
    with atomic_directory(folder) as temporary:
        words: set[str] = set()
        images: list[dict[str, Any]] = []
        for split, count in sizes.items():
            part = PARTS[split]
            (temporary / part).mkdir()
            scenes = {number: make_question_scene(seed, SPLIT_STARTS[split] + number) for number in range(count)}
            for number, scene in scenes.items():
                name = f"COCO_{part}_{number:012d}.jpg"
                render(scene, image_size).save(temporary / part / name, "JPEG", quality=95, subsampling=0)
                sentences = [{"raw": caption} for caption in captions(scene)]
                images.append({"filename": name, "filepath": part, "split": split, "sentences": sentences})
                words.update(word for caption in captions(scene) for word in _pieces(caption))
            words |= _write_questions(temporary, part, scenes)
        (temporary / "dataset_coco.json").write_text(json.dumps({"dataset": "coco", "images": images}))
        (temporary / "vocab.txt").write_text("\n".join([*BERT_SPECIALS, *sorted(words)]) + "\n")
    return folder


def _write_questions(folder: Path, part: str, scenes: dict[int, Scene]) -> set[str]:
    """VQAv2's two files of a part; the words of its questions."""
    asked, answered = [], []
    words: set[str] = set()
    for number, scene in scenes.items():
        for i, question in enumerate(questions(scene)):
            ids = {"image_id": number, "question_id": 10 * number + i}
            asked.append({**ids, "question": question.text})
            answers = [{"answer": question.answer, "answer_confidence": "yes", "answer_id": k + 1} for k in range(PEOPLE)]
            kinds = {"question_type": question.kind, "answer_type": "other"}
            answered.append({**ids, **kinds, "multiple_choice_answer": question.answer, "answers": answers})
            words.update(_pieces(question.text))
    (folder / f"v2_OpenEnded_mscoco_{part}_questions.json").write_text(json.dumps({"questions": asked}))
    (folder / f"v2_mscoco_{part}_annotations.json").write_text(json.dumps({"annotations": answered}))
    return words


def _relation_question(one: Thing, other: Thing, rng: np.random.Generator) -> Question:
    """Yes and no are equally likely, whatever the question says."""
    dx, dy = one.x - other.x, one.y - other.y
    if abs(dx) > abs(dy):
        relation, holds = ("left of", dx < 0) if rng.random() < 0.5 else ("right of", dx > 0)
    else:
        relation, holds = ("above", dy < 0) if rng.random() < 0.5 else ("below", dy > 0)
    return Question(f"is the {one.shape} {relation} the {other.shape}?", "yes" if holds else "no", "relation")


def _place(thing: Thing) -> str:
    return f"{'top' if thing.y < 0.5 else 'bottom'} {'left' if thing.x < 0.5 else 'right'}"


def _pieces(text: str) -> list[str]:
    return text.replace("?", " ?").replace(",", " ,").split()
