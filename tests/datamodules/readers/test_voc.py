"""The reader of Pascal VOC's segmentation layout, on small files of exactly that layout, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from datamodules.readers.voc import VOC_CLASSES, VocSegmentation, voc_palette
from models.errors import UserError

NAMES = ("2007_000033", "2007_000042")


@pytest.fixture
def root(tmp_path):
    """Two pictures of unequal shape; the masks hold an aeroplane (1), a train (19) and void, as the release saves them."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for number, name in enumerate(NAMES):
        height, width = 20 + number, 30
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"JPEGImages/{name}.jpg")
        _save_mask(tmp_path, name, _labels(number))
    (tmp_path / "ImageSets/Segmentation/val.txt").write_text("".join(f"{name}\n" for name in NAMES))
    return tmp_path


def _labels(number: int) -> np.ndarray:
    labels = np.zeros((20 + number, 30), np.uint8)
    labels[4:12, 5:20] = 255
    labels[5:11, 6:19] = (1, 19)[number]
    return labels


def _save_mask(root, name, labels, palette=None):
    mask = Image.fromarray(labels)
    mask.putpalette((voc_palette() if palette is None else palette).tobytes())
    mask.save(root / f"SegmentationClass/{name}.png")


def test_reads_what_the_release_holds(root):
    data = VocSegmentation(root)
    assert len(data) == 2 and data.names == list(NAMES)
    assert len(data.class_names) == 21 and data.class_names[0] == "background" and data.class_names[19] == "train"
    for number in range(2):
        image, labels = data[number]
        assert image.mode == "RGB" and image.size == (30, 20 + number)
        assert np.array_equal(labels, _labels(number))


def test_palette_is_the_published_one():
    """The colours of the development kit's documentation."""
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 9: (192, 0, 0), 15: (192, 128, 128), 20: (0, 64, 128)}
    known[255] = (224, 224, 192)
    assert {number: tuple(voc_palette()[number].tolist()) for number in known} == known
    assert len(np.unique(voc_palette(), axis=0)) == 256


def test_names_of_ones_own(root, tmp_path):
    (root / "classes.txt").write_text("nothing\n" + "\n".join(VOC_CLASSES[1:]) + "\n")
    assert VocSegmentation(root).class_names[0] == "nothing"
    (tmp_path / "other.txt").write_text("void\nplane\n")
    assert VocSegmentation(root, classes_file=tmp_path / "other.txt").class_names == ["void", "plane"]
    with pytest.raises(UserError, match="class number 19, but there are 2 class names"):
        VocSegmentation(root, classes_file=tmp_path / "other.txt")[1]
    (root / "classes.txt").write_text("alone\n")
    with pytest.raises(UserError, match="names 1 classes"):
        VocSegmentation(root)


def test_a_grey_map_of_class_numbers_is_taken(root):
    Image.fromarray(_labels(0)).save(root / f"SegmentationClass/{NAMES[0]}.png")
    assert np.array_equal(VocSegmentation(root)[0][1], _labels(0))


@pytest.mark.parametrize("lost", [f"JPEGImages/{NAMES[1]}.jpg", f"SegmentationClass/{NAMES[1]}.png"])
def test_a_missing_file_is_named(root, lost):
    (root / lost).unlink()
    with pytest.raises(UserError, match=f"1 of the 2 files.*{lost.rpartition('/')[2]}"):
        VocSegmentation(root)


def test_a_missing_or_empty_list_is_named(root):
    (root / "ImageSets/Segmentation/val.txt").write_text("\n")
    with pytest.raises(UserError, match="val.txt is empty"):
        VocSegmentation(root)
    with pytest.raises(UserError, match=r"(?s)there is no .*train.txt.*SegmentationClass/<name>.png"):
        VocSegmentation(root, "train")
    with pytest.raises(UserError, match="there is no"):
        VocSegmentation(root / "absent")


def test_renumbered_colours_are_refused(root):
    renumbered = voc_palette()
    renumbered[[1, 7]] = renumbered[[7, 1]]
    _save_mask(root, NAMES[0], _labels(0), renumbered)
    with pytest.raises(UserError, match=r"000033.png has .* .number 1 is \[128, 128, 128\], not \[128, 0, 0\]"):
        VocSegmentation(root)[0]
    # As editors do it: the colours stay, the numbers follow their frequency.
    with Image.open(root / f"SegmentationClass/{NAMES[1]}.png") as mask:
        again = mask.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    again.save(root / f"SegmentationClass/{NAMES[1]}.png")
    with pytest.raises(UserError, match="another palette"):
        VocSegmentation(root)[1]


def test_saved_colours_are_refused(root):
    path = root / f"SegmentationClass/{NAMES[0]}.png"
    with Image.open(path) as mask:
        colours = mask.convert("RGB")
    colours.save(path)
    with pytest.raises(UserError, match="mode RGB"):
        VocSegmentation(root)[0]


def test_unequal_sizes_are_refused(root):
    _save_mask(root, NAMES[0], _labels(1))
    with pytest.raises(UserError, match="has 30 x 21 pixels, its image 30 x 20"):
        VocSegmentation(root)[0]


@pytest.mark.parametrize("file", [f"JPEGImages/{NAMES[0]}.jpg", f"SegmentationClass/{NAMES[0]}.png"])
@pytest.mark.parametrize("kept", [0, 0.6])
def test_a_damaged_file_is_named(root, file, kept):
    data = (root / file).read_bytes()
    (root / file).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(UserError, match=f"{file.rpartition('/')[2]} cannot be read"):
        VocSegmentation(root)[0]
