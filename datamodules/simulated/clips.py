"""Clips of moving shapes, with captions, questions and choices whose answers depend on the order of the frames.

There are two kinds. In a *turn*, one shape appears, then another: what came first, what last? In a *move*, one shape comes
closer or goes away: which way? Then the light goes out. The frames of a clip, shuffled, leave two answers open to every
question.

A clip is a pure function of (seed, index). The world is written as MSR-VTT lies on disk: mp4 files, MSRVTT-QA and its answers,
retrieval captions, multiple choice; and the same clips once more as WebVid captions, LSMDC's multiple choice and CC3M images.
"""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from datamodules.readers.video import write_mp4
from datamodules.simulated.shapes import COLOURS, SHAPES, draw_shape
from datamodules.simulated.worlds import SPLIT_STARTS
from models.errors import UserError
from models.io import atomic_directory, stable_hash

WORLD = 2  # raise it when the same arguments would give other clips or words
WAYS = {"closer": "away", "away": "closer"}  # each with its opposite
ANSWERS = (*COLOURS, *WAYS)
ACTS = 3  # before, after, and dark
DARK = (22, 22, 26)
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Clip(NamedTuple):
    """``kind`` turn: ``shapes`` are the first and the second one; move: the one shape and its ``way``."""

    kind: str
    shapes: tuple[tuple[str, str], ...]  # (colour, shape)
    way: str = ""

    @property
    def caption(self) -> str:
        names = [f"a {colour} {shape}" for colour, shape in self.shapes]
        return f"{names[0]} and then {names[1]}" if self.kind == "turn" else f"{names[0]} moves {self.way}"

    @property
    def reversed_caption(self) -> str:
        """What the clip would show backwards."""
        if self.kind == "turn":
            return self._replace(shapes=self.shapes[::-1]).caption
        return self._replace(way=WAYS[self.way]).caption

    @property
    def questions(self) -> list[tuple[str, str, str]]:
        """(question, answer, kind of question)."""
        if self.kind == "turn":
            (first, _), (last, _) = self.shapes
            return [("what first?", first, "order"), ("what last?", last, "order")]
        return [("which way?", self.way, "way")]


def make_clip(seed: int, index: int, frames: int, size: int) -> tuple[Clip, NDArray[np.uint8]]:
    """Clip number ``index`` of the world ``seed`` and its images (frames, size, size, 3)."""
    rng = np.random.default_rng((seed, index))
    colours = [list(COLOURS)[i] for i in rng.choice(len(COLOURS), 2, replace=False)]
    shapes = [list(SHAPES)[i] for i in rng.integers(0, len(SHAPES), 2)]
    ground = int(rng.integers(200, 246))
    scenes: list[Any]
    if index % 2 == 0:
        clip = Clip("turn", tuple(zip(colours, shapes, strict=True)))
        radius = rng.uniform(0.3, 0.42, 2)
        places = [rng.uniform(r, 1 - r, 2) for r in radius]
        drift = rng.uniform(-0.06, 0.06, (2, 2))
        scenes = []
        for frame in range(frames):
            act, progress = frame * ACTS // frames, frame * ACTS % frames / frames
            scenes.append((act, places[act] + drift[act] * progress, radius[act]) if act < 2 else None)
    else:
        way = list(WAYS)[rng.integers(len(WAYS))]
        clip = Clip("move", ((colours[0], shapes[0]),), way)
        centre, drift = rng.uniform(0.42, 0.58, 2), rng.uniform(-0.06, 0.06, 2)
        # One size per act: were it to change within an act, the frame that is taken of it would betray the order.
        sizes = (rng.uniform(0.12, 0.2), rng.uniform(0.36, 0.45))[:: 1 if way == "closer" else -1]
        visible = 2 * frames // ACTS
        scenes = [(0, centre + drift * (i / visible - 0.5), sizes[i * ACTS // frames]) for i in range(visible)]
        scenes += [None] * (frames - len(scenes))
    images = []
    for scene in scenes:
        canvas = Image.new("RGB", (2 * size, 2 * size), DARK if scene is None else (ground,) * 3)
        if scene is not None:
            which, centre, r = scene
            colour, shape = clip.shapes[which]
            draw_shape(ImageDraw.Draw(canvas), shape, COLOURS[colour], tuple(centre * 2 * size), r * 2 * size)
        images.append(np.asarray(canvas.reduce(2)))
    return clip, np.stack(images)


def write_clips(
    root: str, train: int = 2400, val: int = 240, test: int = 400, size: int = 40, frames: int = 12, fps: int = 6, seed: int = 0
) -> Path:
    """The data root with the simulated data set of these arguments, written unless it is there already.

    It is ``root/clips_<hash of the arguments>`` and appears whole or not at all.

    Args:
        train, val, test: number of clips.
        size: of the images in pixels, even.
        frames: of each video.
        fps: frames per second.
        seed: of the world.
    """
    sizes = {"train": train, "val": val, "test": test}
    folder = Path(root, f"clips_{stable_hash([WORLD, sizes, size, frames, fps, seed])}")
    if folder.is_dir():
        return folder
    with atomic_directory(folder) as temporary:
        videos = temporary / "msrvtt" / "videos" / "all"
        videos.mkdir(parents=True)
        clips: dict[str, dict[str, Clip]] = {}
        stills: dict[str, Image.Image] = {}
        for split, count in sizes.items():
            clips[split] = {}
            for number in range(SPLIT_STARTS[split], SPLIT_STARTS[split] + count):
                clip, images = make_clip(seed, number, frames, size)
                write_mp4(videos / f"video{number}.mp4", images, fps)
                clips[split][f"video{number}"] = clip
                if split == "train":
                    stills[f"video{number}"] = Image.fromarray(images[0])
        _write_questions(temporary / "meta_data" / "msrvtt", clips)
        _write_retrieval(temporary / "msrvtt", clips)
        _write_webvid(temporary, clips)
        _write_choices(temporary, clips)
        _write_images(temporary, stills, clips["train"])
        (temporary / "vocab.txt").write_text("\n".join(_vocabulary(clips)) + "\n")
    return folder


def _write_questions(folder: Path, clips: dict[str, dict[str, Clip]]) -> None:
    folder.mkdir(parents=True)
    (folder / "msrvtt_train_ans2label.json").write_text(json.dumps({name: i for i, name in enumerate(ANSWERS)}))
    for split, named in clips.items():
        lines: list[dict[str, Any]] = [
            {"question": question, "answer": answer, "video_id": name, "type": kind}
            for name, clip in named.items()
            for question, answer, kind in clip.questions
        ]
        (folder / f"msrvtt_qa_{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = []
    for name, options in _options(clips["test"]).items():
        order = np.random.default_rng((2, len(lines))).permutation(len(options))
        lines.append({"clip_name": name, "options": [options[i] for i in order], "answer": int(np.flatnonzero(order == 0)[0])})
    (folder / "msrvtt_mc_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _options(clips: dict[str, Clip]) -> dict[str, list[str]]:
    """Five captions for each clip: its own, what it would show backwards, and three of other clips."""
    captions = list(dict.fromkeys(clip.caption for clip in clips.values()))
    options = {}
    for place, (name, clip) in enumerate(clips.items()):
        first = [clip.caption, clip.reversed_caption]
        order = np.random.default_rng((1, place)).permutation(len(captions))
        options[name] = (first + [captions[i] for i in order if captions[i] not in first])[:5]
        if len(options[name]) < 5:
            raise UserError(f"datamodule.simulate: {len(clips)} clips have too few captions for five options; take 12 or more.")
    return options


def _write_choices(root: Path, clips: dict[str, dict[str, Clip]]) -> None:
    """LSMDC's multiple choice: the training file has the right option first, the test file its number from 1."""
    meta, media = root / "meta_data" / "lsmdc", root / "lsmdc" / "simulated"
    meta.mkdir(parents=True)
    media.mkdir(parents=True)
    for split, part in (("train", "train"), ("test", "test_randomized")):
        rows = []
        for place, (name, options) in enumerate(_options(clips[split]).items()):
            os.link(root / "msrvtt" / "videos" / "all" / f"{name}.mp4", media / f"simulated_{name}.avi")
            order = np.arange(5) if split == "train" else np.random.default_rng((3, place)).permutation(5)
            right = int(np.flatnonzero(order == 0)[0]) + 1
            rows.append("\t".join([f"simulated_{name}", *"----", *(options[i] for i in order), str(right)]))
        (meta / f"LSMDC16_multiple_choice_{part}.csv").write_text("\n".join(rows) + "\n")


def _write_images(root: Path, images: dict[str, Image.Image], clips: dict[str, Clip]) -> None:
    """CC3M: the first frame of each training clip, with the name of what is on it."""
    meta, media = root / "meta_data" / "cc3m", root / "cc3m" / "training"
    meta.mkdir(parents=True)
    media.mkdir(parents=True)
    rows = ["caption\tfile"]
    for name, image in images.items():
        image.save(media / f"{name}.jpg", quality=92)
        rows.append(f"a {' '.join(clips[name].shapes[0])}\t{name}.jpg")
    (meta / "cc3m_training_success_full.tsv").write_text("\n".join(rows) + "\n")


def _write_retrieval(folder: Path, clips: dict[str, dict[str, Clip]]) -> None:
    lists = folder / "high-quality" / "structured-symlinks"
    lists.mkdir(parents=True)
    (folder / "annotation").mkdir()
    entries = [{"image_id": n, "caption": c.caption} for named in clips.values() for n, c in named.items()]
    (folder / "annotation" / "MSR_VTT.json").write_text(json.dumps({"annotations": entries}))
    (lists / "train_list_jsfusion.txt").write_text("\n".join([*clips["train"], *clips["val"]]) + "\n")
    (lists / "val_list_jsfusion.txt").write_text("\n".join(clips["test"]) + "\n")
    with (lists / "jsfusion_val_caption_idx.pkl").open("wb") as file:
        pickle.dump(dict.fromkeys(clips["test"], 0), file)


def _write_webvid(root: Path, clips: dict[str, dict[str, Clip]]) -> None:
    meta = root / "meta_data" / "webvid"
    meta.mkdir(parents=True)
    for split, part in (("train", "training"), ("val", "validation")):
        folder = root / "webvid" / split / "000"
        folder.mkdir(parents=True)
        rows = ["caption\tpath"]
        for name, clip in clips[split].items():
            os.link(root / "msrvtt" / "videos" / "all" / f"{name}.mp4", folder / f"{name}.mp4")
            rows.append(f"{clip.caption}\t000/{name}")
        (meta / f"webvid_{part}_success_full.tsv").write_text("\n".join(rows) + "\n")


def _vocabulary(clips: dict[str, dict[str, Clip]]) -> list[str]:
    """Every word and sign of the world's texts, in BERT's layout."""
    texts = [c.caption for named in clips.values() for c in named.values()]
    texts += [question for named in clips.values() for c in named.values() for question, _, _ in c.questions]
    words = sorted(
        {word for text in texts for word in text.replace("?", " ?").split()} | set(COLOURS) | set(SHAPES) | set(WAYS)
    )
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [*SPECIALS, *dict.fromkeys([*sorted(words), *letters]), *(f"##{letter}" for letter in letters)]
