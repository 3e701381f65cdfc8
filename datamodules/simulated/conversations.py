"""Scenes with questions and captions, in LLaVA's JSON format, with a tokenizer of their words.

The scenes are those of :mod:`datamodules.simulated.questions`. A file holds one question per conversation; the captions of the
training scenes stand in a file of their own, and a mix joins both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datamodules.simulated.questions import captions, make_question_scene, questions
from datamodules.simulated.scenes import render
from datamodules.simulated.worlds import SPLIT_STARTS
from models.io import atomic_directory, stable_hash

WORLD = 1  # raise it when the same arguments would give other scenes, texts or tokens

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
UNKNOWN = "<unk>"
PIECE = r" ?\w+| ?[^\w\s]|\n"  # a word with the space before it, a sign, or the end of a line
FRAME = "system\nuser\nassistant\nYou are a helpful assistant."
CAPTION = "Describe the image."
MIX = """datasets:
  - json_path: train.json
    sampling_strategy: all
  - json_path: captions.json
    sampling_strategy: first:50%
"""


def write_conversations(
    root: str, train: int = 2300, val: int = 150, test: int = 400, image_size: int = 32, seed: int = 0
) -> Path:
    """The folder with the simulated set of these arguments, written unless it is there already: ``{train,val,test}.json``,
    ``captions.json`` and ``mix.yaml``, images, and ``tokenizer.json``.

    Args:
        root: the set is ``root/conversations_<hash of the arguments>`` and appears whole or not at all.
        train: number of scenes.
        val: likewise.
        test: likewise.
        image_size: side of the square JPEGs in pixels.
        seed: of the world.
    """
    sizes = {"train": train, "val": val, "test": test}
    folder = Path(root, f"conversations_{stable_hash([WORLD, sizes, image_size, seed])}")
    if folder.is_dir():
        return folder
    with atomic_directory(folder) as temporary:
        texts = {FRAME, CAPTION}
        described: list[dict[str, Any]] = []
        for split, count in sizes.items():
            (temporary / split).mkdir()
            entries: list[dict[str, Any]] = []
            for number in range(count):
                scene, name = make_question_scene(seed, SPLIT_STARTS[split] + number), f"{split}/{number:06d}.jpg"
                render(scene, image_size).save(temporary / name, "JPEG", quality=95, subsampling=0)
                for i, asked in enumerate(questions(scene)):
                    entries.append(_entry(f"{split}-{number}-{i}", name, asked.text, asked.answer, asked.kind))
                if split == "train":
                    described.append(_entry(f"caption-{number}", name, CAPTION, captions(scene)[0], "caption"))
            (temporary / f"{split}.json").write_text(json.dumps(entries, indent=1))
            texts.update(said["value"] for entry in (*entries, *described) for said in entry["conversations"])
        (temporary / "captions.json").write_text(json.dumps(described, indent=1))
        (temporary / "mix.yaml").write_text(MIX)
        write_tokenizer(temporary, texts)
    return folder


def write_tokenizer(folder: Path, texts: Iterable[str]) -> None:
    """``tokenizer.json`` and its configuration with a token for every word of ``texts``, alone and behind a space."""
    words = {piece.strip(" ") for text in texts for piece in re.findall(PIECE, text)}
    pieces = [*SPECIALS, UNKNOWN, *sorted(words), *sorted(f" {word}" for word in words if word.strip())]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": number, "content": name, **special} for number, name in enumerate(SPECIALS)],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": PIECE}, "behavior": "Isolated", "invert": False},
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": {piece: i for i, piece in enumerate(pieces)}, "unk_token": UNKNOWN},
    }  # fmt: skip
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[2], "pad_token": SPECIALS[0]}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _entry(name: str, image: str, question: str, answer: str, kind: str) -> dict[str, Any]:
    said = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": image, "category": kind, "conversations": said}
