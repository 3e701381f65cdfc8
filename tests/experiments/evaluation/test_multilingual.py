"""Retrieval in several languages over small lists of XTD10's layout."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from experiments.evaluation.base import EmbeddedSplit
from experiments.evaluation.multilingual import multilingual_retrieval
from models.errors import UserError

COLOURS = {"a.jpg": (255, 0, 0), "b.jpg": (0, 255, 0), "c.jpg": (0, 0, 255), "d.jpg": (255, 255, 0)}
WORDS = {"en": ["red", "green", "blue", "yellow"], "es": ["rojo", "verde", "azul", "amarillo"]}


class _Encoders:
    def embed_images(self, images):
        return torch.tensor([[value / 255 for value in image.resize((1, 1)).getpixel((0, 0))] for image in images])


def _encode_text(texts):
    """Knows English; of Spanish only the first two words, and takes what it does not know for red."""
    known = dict(zip(WORDS["en"] + WORDS["es"][:2], [*COLOURS.values(), *list(COLOURS.values())[:2]], strict=True))
    return torch.tensor([known.get(text, (255, 1, 0)) for text in texts]).float()


@pytest.fixture
def split():
    none = torch.empty(0)
    return EmbeddedSplit(none, none, none, [], _encode_text, lambda row: None, load_encoders=_Encoders)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "val2014").mkdir()
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (8, 8), colour).save(tmp_path / ("val2014" if number % 2 else "") / name, "PNG")
    (tmp_path / "test_image_names.txt").write_text("".join(f"{name}\n" for name in COLOURS))
    for language, words in WORDS.items():
        (tmp_path / f"test_1kcaptions_{language}.txt").write_text("\n".join(words) + "\n", encoding="utf-8-sig")
    return tmp_path


def test_recall_by_language(split, root):
    metrics = multilingual_retrieval(split, str(root), str(root), ks=(1, 2)).metrics
    assert metrics["multilingual/en/i2t_recall@1"] == metrics["multilingual/en/t2i_recall@1"] == 100
    # 'azul' and 'amarillo' find red first; of the others yellow, which has red in it, comes second.
    assert metrics["multilingual/es/t2i_recall@1"] == 50 and metrics["multilingual/es/t2i_recall@2"] == 75
    assert metrics["multilingual/average/t2i_recall@1"] == 75
    only = multilingual_retrieval(split, str(root), str(root), languages=["es"], ks=(1,))
    assert {name.split("/")[1] for name in only.metrics} == {"es", "average"}
    assert set(only.baselines["chance"].values()) == {25.0}


def test_left_out_without_the_lists(split, root):
    for given in ((None, None), (str(root), None)):
        result = multilingual_retrieval(split, *given)
        assert result.metrics == {} and "evaluation.multilingual.root" in result.notes[0]


def test_lists_that_do_not_fit_are_refused(split, root):
    with pytest.raises(UserError, match="there is no .*test_1kcaptions_ko.txt"):
        multilingual_retrieval(split, str(root), str(root), languages=["ko"])
    spanish = root / "test_1kcaptions_es.txt"
    spanish.write_text("rojo\n\nazul\namarillo\n")
    with pytest.raises(UserError, match="line 2: is blank"):
        multilingual_retrieval(split, str(root), str(root))
    spanish.write_text("rojo\nverde\nazul\n")
    with pytest.raises(UserError, match="has 3 captions for 4 images"):
        multilingual_retrieval(split, str(root), str(root))
    (root / "c.jpg").unlink()
    with pytest.raises(UserError, match="no c.jpg in"):
        multilingual_retrieval(split, str(root), str(root))
    for file in root.glob("test_1kcaptions_*"):
        file.unlink()
    (root / "test_image_names.txt").write_text("a.jpg\n")
    with pytest.raises(UserError, match="holds no test_1kcaptions_<language>.txt"):
        multilingual_retrieval(split, str(root), str(root))
