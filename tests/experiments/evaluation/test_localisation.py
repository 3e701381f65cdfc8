"""The localisation suite over a small set in Pascal VOC's layout, with encoders whose answers are known."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from datamodules.readers.voc import voc_palette
from datamodules.simulated.segmentations import write_scene_segmentations
from experiments.evaluation.base import EmbeddedSplit
from experiments.evaluation.localisation import BASELINES, localisation
from models.alignment.head import AlignmentHead
from models.alignment.projectors import LinearProjector
from models.encoders.base import Features
from models.encoders.preprocess import ImagePreprocess
from models.encoders.vision import HFVisionEncoder
from models.errors import UserError
from models.freeze_align.head import TokenAlignmentHead

CLASSES = ["background", "red", "green", "blue"]
SIDE = 16  # patches of 4 x 4 pixels


class _Colours(nn.Module):
    """Its patches are the mean colours of 4 x 4 pixels, behind a CLS token (and registers) that says something else."""

    def __init__(self, prefix: int = 1):
        super().__init__()
        self.prefix, self.before, self.feature_dim, self.token_dim, self.seen = prefix, prefix, 3, 3, []

    def forward(self, pixels):
        self.seen.append(tuple(pixels.shape))
        patches = nn.functional.avg_pool2d(pixels, 4).flatten(2).mT
        return Features(patches.mean(dim=1), torch.cat([torch.full((len(pixels), self.before, 3), 9.0), patches], dim=1))


class _Encoders:
    """What the suite takes of a dual encoder."""

    def __init__(self, head, prefix: int = 1, preprocess: ImagePreprocess | None = None):
        self.head, self.vision, self.device = head, _Colours(prefix), torch.device("cpu")
        # Shorter side 16, then a crop: the suite must squash instead.
        self.preprocess = preprocess or ImagePreprocess((SIDE, SIDE), SIDE, "BILINEAR", (0.0,) * 3, (1.0,) * 3)


def _head() -> TokenAlignmentHead:
    """Patches go through the identity: (B, 1 + N, 3) colours stay colours."""
    head = TokenAlignmentHead(3, 3, 3, local_vision=LinearProjector)
    with torch.no_grad():
        head.local_vision.weight.copy_(torch.eye(3))
        head.local_vision.bias.zero_()
    return head.eval().requires_grad_(False)


def _encode_text(texts: list[str]) -> torch.Tensor:
    """For its own colour and against the others."""
    return torch.tensor([[1.5 * (text == name) - 0.5 for name in CLASSES[1:]] for text in texts]) * 5


def _split(encoders) -> EmbeddedSplit:
    none = torch.empty(0)
    return EmbeddedSplit(
        none, none, none, [], _encode_text, lambda row: None, hashes={"split": "captions"}, load_encoders=lambda: encoders
    )


@pytest.fixture
def root(tmp_path):
    """Two pictures: a red left third of a wide one; a green and a blue quarter. Aligned with the patches once squashed."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    wide, square = np.zeros((32, 64), np.uint8), np.zeros((32, 32), np.uint8)
    wide[:, :16] = 1
    square[:16, :16], square[16:, 16:] = 2, 3
    for name, labels in (("wide", wide), ("square", square)):
        colours = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)], np.uint8)[labels]
        Image.fromarray(colours).save(tmp_path / f"JPEGImages/{name}.jpg", quality=100, subsampling=0)
        mask = Image.fromarray(labels)
        mask.putpalette(voc_palette().tobytes())
        mask.save(tmp_path / f"SegmentationClass/{name}.png")
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("wide\nsquare\n")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return tmp_path


@pytest.mark.parametrize("prefix", [1, 5])
def test_finds_what_the_names_say(root, prefix):
    encoders = _Encoders(_head(), prefix)
    result = localisation(_split(encoders), str(root), size=64)
    assert encoders.vision.seen == [(2, 3, SIDE, SIDE)]
    # Patches are cut at the things' edges; what is missing is blur.
    assert all(value > 75 for value in result.metrics.values())
    assert result.baselines.keys() == set(BASELINES)
    assert result.baselines["whole image"]["localisation/image_iou"] == pytest.approx(25)
    # The middle half of the sides covers a quarter: of the red quarter none, a quarter of each of the other two.
    shared = 100 * (1 / 16) / (1 / 4 + 1 / 4 - 1 / 16)
    assert result.baselines["centre box"]["localisation/class_iou"] == pytest.approx(2 * shared / 3)
    assert result.baselines["name of another class"]["localisation/image_iou"] < 5
    assert 5 < result.baselines["random map"]["localisation/image_iou"] < 60
    assert result.hashes["split"] != "captions" and result.notes == []


def test_scale_of_patches_and_texts_does_not_matter_but_names_do(root):
    result = localisation(_split(_Encoders(_head())), str(root), size=64)
    grown = _head()
    with torch.no_grad():
        grown.local_vision.weight.mul_(7)
    assert localisation(_split(_Encoders(grown)), str(root), size=64).metrics == pytest.approx(result.metrics, rel=1e-4)
    (root / "classes.txt").write_text("background\ngreen\nred\nred\n")
    renamed = localisation(_split(_Encoders(_head())), str(root), size=64)
    assert renamed.metrics["localisation/class_iou"] < 5
    assert renamed.hashes["prompts"] != result.hashes["prompts"]


def test_pictures_and_limit(root, tmp_path):
    result = localisation(_split(_Encoders(_head())), str(root), size=64, limit=1)
    assert "first 1 of 2 images" in result.notes[0]
    assert result.baselines["centre box"]["localisation/image_iou"] == 0
    (example,) = result.figures["localisation"].args[0]
    assert example["name"] == "red" and example["iou"] == pytest.approx(result.metrics["localisation/image_iou"])
    with Image.open(result.figures["localisation"](tmp_path / "localisation.png")) as picture:
        assert np.asarray(picture.convert("RGB")).std() > 10


def test_simulated_scenes_go_through_the_same_reader(tmp_path):
    def simulate(root):
        return write_scene_segmentations(root, images=3, image_size=32)

    split = _split(_Encoders(_head()))
    own_data = localisation(split, str(tmp_path), simulate, size=32)
    assert not own_data.metrics and "would be simulated" in own_data.notes[0]
    split.simulated = True
    result = localisation(split, str(tmp_path), simulate, size=32)
    assert 0 <= result.metrics["localisation/class_iou"] <= 100
    assert list(tmp_path.glob("voc_scenes_*/SegmentationClass/*.png"))


def test_a_set_of_ones_own_goes_before_the_simulated_one(root):
    def simulate(_):
        raise AssertionError("there is a set already")

    assert localisation(_split(_Encoders(_head())), str(root), simulate, size=64).metrics


def test_left_out_without_folder_or_projector_of_patches(root):
    assert "evaluation.localisation.root" in localisation(_split(_Encoders(_head()))).notes[0]
    cls_only = TokenAlignmentHead(3, 3, 3, cls_vision=LinearProjector)
    pooled = AlignmentHead(vision_dim=3, text_dim=3, embed_dim=3, projector=LinearProjector)
    for head in (cls_only, pooled):
        result = localisation(_split(_Encoders(head)), str(root))
        assert result.metrics == {} and "no single patches" in result.notes[0]


def test_tokens_that_are_no_grid_are_refused(root):
    encoders = _Encoders(_head())
    encoders.vision.before = 3  # two registers that nobody told of
    with pytest.raises(UserError, match="18 tokens beside its first for 16 x 16 pixels"):
        localisation(_split(encoders), str(root))
    wide = replace(_Encoders(_head()).preprocess, size=(16, 32))
    assert localisation(_split(_Encoders(_head(), preprocess=wide)), str(root)).metrics


def test_masks_without_a_class_are_an_error(root):
    for name in ("wide", "square"):
        path = root / f"SegmentationClass/{name}.png"
        with Image.open(path) as mask:
            Image.new("L", mask.size, 0).save(path)
    with pytest.raises(UserError, match="none of the 2 masks"):
        localisation(_split(_Encoders(_head())), str(root))


def test_dinov2_as_the_recipe_runs_it(root, tmp_path):
    """256 x 256 pixels, squashed, leave 18 x 18 patches of 14; more pixels a finer grid."""
    torch.manual_seed(0)
    tiny = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=70, patch_size=14)
    Dinov2Model(Dinov2Config(**tiny)).save_pretrained(tmp_path / "dinov2")
    arguments = {"pooling": "cls", "image_size": 256, "squash": True, "position_offset": 0.1}
    vision = HFVisionEncoder("dinov2", str(tmp_path / "dinov2"), **arguments)
    head = TokenAlignmentHead(8, 3, 3, local_vision=LinearProjector).eval().requires_grad_(False)
    encoders = SimpleNamespace(vision=vision, head=head, preprocess=vision.preprocess, device=torch.device("cpu"))
    for image_size, side in ((None, 18), (280, 20)):
        result = localisation(_split(encoders), str(root), image_size=image_size)
        assert result.figures["localisation"].args[0][0]["map"].shape == (side, side)
