"""Zero-shot classification on folders of pictures, one for each class."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from PIL import Image
from timm.data.constants import OPENAI_CLIP_MEAN

from experiments.evaluation.base import EmbeddedSplit
from experiments.evaluation.zero_shot import zero_shot
from experiments.evaluation.zero_shot_sets import zero_shot_sets
from models.encoders.preprocess import ImagePreprocess
from models.errors import UserError

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class _Encoders:
    """An image is its colour; ``asked`` keeps which pixel statistics were asked for."""

    preprocess = ImagePreprocess((4, 4), None)
    asked: list = []

    def embed_images(self, images, preprocess=None):
        self.asked.append(preprocess.mean if preprocess else None)
        return torch.tensor([image.resize((1, 1)).getpixel((0, 0)) for image in images]).float()


def _encode_text(texts):
    return torch.tensor([next((c for name, c in COLOURS.items() if name in text), (1, 1, 1)) for text in texts]).float()


@pytest.fixture
def split(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_Encoders, "asked", [])
    none = torch.empty(0)
    return EmbeddedSplit(none, none, none, [], _encode_text, None, hashes={"encoders": "e"}, load_encoders=_Encoders)


def _folders(root, classes):
    for folder, colours in classes.items():
        (root / folder).mkdir(parents=True)
        for number, colour in enumerate(colours):
            Image.new("RGB", (6, 5), COLOURS[colour]).save(root / folder / f"{number}.png")
    return str(root)


def test_each_set_and_their_mean(split, tmp_path):
    whole = _folders(tmp_path / "a", {"red": ["red", "red"], "green": ["green"]})
    half = _folders(tmp_path / "b", {"blue": ["blue", "red"], "red": ["red", "blue"]})
    result = zero_shot_sets(split, partial(zero_shot, templates=["a {}"]), {"a": {"images": whole}, "b": {"images": half}})
    assert result.metrics["zeroshot_sets/a/top1"] == 100 and result.metrics["zeroshot_sets/b/top1"] == 50
    assert result.metrics["zeroshot_sets/average/top1"] == 75
    assert result.baselines["chance"]["zeroshot_sets/b/top1"] == 50
    assert set(result.hashes) == {"a", "b"} and _Encoders.asked == [None, None]


def test_descriptions_by_the_order_of_numbered_folders(split, tmp_path):
    """ImageNet-V2: folders 0, 1, ... 10 are the classes, in the order of numbers; prompts come in the order of the file."""
    colours = ["red", "green", "blue"]
    root = _folders(tmp_path / "v2", {str(number): [colours[number % 3]] for number in range(12)})
    (tmp_path / "words.json").write_text(json.dumps({f"n{number:04d}": [colours[number % 3]] for number in range(12)}))
    judge = partial(zero_shot, templates=["a {}"], descriptions_order="file")
    sets = {"v2": {"images": root, "descriptions": str(tmp_path / "words.json")}}
    result = zero_shot_sets(split, judge, sets, statistics="clip")
    # Four classes share a colour: the first of them is named for all.
    assert result.metrics["zeroshot_sets/v2/descriptions_top1"] == 25
    assert result.metrics["zeroshot_sets/v2/descriptions_top5"] == 100
    assert _Encoders.asked == [OPENAI_CLIP_MEAN]  # encoded once
    assert result.metrics["zeroshot_sets/v2/descriptions_top5"] > result.metrics["zeroshot_sets/v2/top1"]


def test_names_and_templates_of_each_set_from_one_file(split, tmp_path):
    """STRUCTURE's form of CLIP's lists: folders named by numbers, names and templates elsewhere."""
    root = _folders(tmp_path / "a", {"0": ["red"], "1": ["green", "green"], "2": ["blue"]})
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps({"a": {"classes": ["red", "green", "blue"], "templates": ["a {}", "some {} thing"]}}))
    judge, sets = partial(zero_shot, templates=["{}"]), {"a": {"images": root}}
    assert zero_shot_sets(split, judge, sets).metrics["zeroshot_sets/a/top1"] == 25  # numbers mean nothing: the first wins
    result = zero_shot_sets(split, judge, sets, str(file))
    assert result.metrics["zeroshot_sets/a/top1"] == result.metrics["zeroshot_sets/a/macro_f1"] == 100
    for content, words in (
        ("{", "is not JSON"),
        ("{}", "'a' needs a list"),
        ('{"a": {"classes": ["x"], "templates": ["{}"]}}', "1 classes"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=words):
            zero_shot_sets(split, judge, sets, str(file))


def test_what_is_refused(split, tmp_path):
    judge = partial(zero_shot, templates=["a {}"])
    assert "sets names none" in zero_shot_sets(split, judge).notes[0]
    root = _folders(tmp_path / "a", {"red": ["red"], "green": ["green"]})
    with pytest.raises(UserError, match=r"sets.a: unknown .'image'"):
        zero_shot_sets(split, judge, {"a": {"image": root}})
    with pytest.raises(UserError, match="sets.a: give its folder"):
        zero_shot_sets(split, judge, {"a": {"images": None}})
    (tmp_path / "a" / "red" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="red/0.png cannot be read"):
        zero_shot_sets(split, judge, {"a": {"images": root}})
