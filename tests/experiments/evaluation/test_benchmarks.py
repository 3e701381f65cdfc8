"""Winoground, MMVP, k-NN and segmentation on tiny copies of the official layouts, with a model whose answers are known."""

from __future__ import annotations

import json
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers import Dinov2Config, Dinov2Model

from datamodules.readers import benchmarks
from experiments.evaluation.base import EmbeddedSplit
from experiments.evaluation.compositional import mmvp, winoground
from experiments.evaluation.knn import knn
from experiments.evaluation.segmentation import prepare, segmentation
from models.alignment.dual_encoder import DualEncoder
from models.alignment.head import AlignmentHead
from models.alignment.projectors import LinearProjector
from models.encoders.base import Features
from models.errors import UserError
from models.sail.segmentation import SegmentationEncoder, sliding_window_logits

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class _Eye(torch.nn.Module):
    """The mean colour of a picture."""

    identity = {"name": "eye"}

    def preprocess(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def forward(self, pixels):
        return Features(pixels.mean(dim=(2, 3)))


class _Reader(torch.nn.Module):
    """The sum of the colours a text names."""

    def tokenize(self, texts):
        rows = [[float(colour in text.split()) for colour in COLOURS] for text in texts]
        return {"colours": torch.tensor(rows)}

    def forward(self, tokens):
        return Features(tokens["colours"])


class _Identity(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.tensor([2.0]))

    def encode_image(self, x):
        return x

    encode_text = encode_image


def _subject(**fields) -> EmbeddedSplit:
    encoders = DualEncoder(_Eye(), _Reader(), _Identity())
    empty = torch.empty(0, 3)
    return EmbeddedSplit(
        empty, empty, torch.empty(0), [], encoders.embed_texts, lambda row: None, load_encoders=lambda: encoders,
        **{"hashes": {"preprocessing": "p"}, **fields},
    )  # fmt: skip


def _picture(*colours: str) -> Image.Image:
    return Image.fromarray(np.array([[COLOURS[c] for c in colours] * 4], np.uint8).repeat(4, axis=0))


# ---- Winoground ------------------------------------------------------------------------------------------------------

EXAMPLES = [  # captions, colours of the images; what is right: text, image
    (("a red thing", "a blue thing"), ("red", "blue"), (True, True)),
    (("a red thing", "a blue thing"), ("blue", "red"), (False, False)),
    (("a green thing", "a green thing"), ("green", "red"), (False, False)),  # captions tie
    (("a red blue thing", "a red thing"), ("blue", "red"), (True, False)),  # images tie
]


def _winoground(folder, zipped: bool):
    data = folder / "data"
    (data / "images").mkdir(parents=True)
    lines = []
    for number, (captions, colours, _) in enumerate(EXAMPLES):
        for i, colour in enumerate(colours):
            _picture(colour).save(data / "images" / f"ex_{number}_img_{i}.png")
        row = {"id": number, "image_0": f"ex_{number}_img_0", "image_1": f"ex_{number}_img_1", "tag": "Object"}
        lines.append(json.dumps(row | {"caption_0": captions[0], "caption_1": captions[1]}))
    (data / "examples.jsonl").write_text("\n".join(lines) + "\n")
    if zipped:
        with zipfile.ZipFile(data / "images.zip", "w") as archive:
            for path in sorted((data / "images").iterdir()):
                archive.write(path, f"images/{path.name}")
                path.unlink()
        (data / "images").rmdir()
    return folder


@pytest.mark.parametrize("zipped", [False, True])
def test_winoground(tmp_path, zipped):
    result = winoground(_subject(), str(_winoground(tmp_path, zipped)))
    assert result.metrics["winoground/text"] == pytest.approx(100 * sum(e[2][0] for e in EXAMPLES) / 4)
    assert result.metrics["winoground/image"] == pytest.approx(100 * sum(e[2][1] for e in EXAMPLES) / 4)
    assert result.metrics["winoground/group"] == pytest.approx(25)
    assert set(result.hashes) == {"preprocessing", "split", "prompts"}
    assert winoground(_subject(), None).notes[0].startswith("Winoground left out")


def test_winoground_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"no examples.jsonl .*(?s:.*)gated"):
        winoground(_subject(), str(tmp_path))
    root = _winoground(tmp_path, zipped=False)
    (root / "data/images/ex_1_img_0.png").unlink()
    with pytest.raises(UserError, match="no image 'ex_1_img_0'"):
        winoground(_subject(), str(root))
    (root / "data/examples.jsonl").write_text('{"caption_0": "a"}\n')
    with pytest.raises(UserError, match="line 1: needs caption_0.*caption_1"):
        winoground(_subject(), str(root))


# ---- MMVP ------------------------------------------------------------------------------------------------------------


def _mmvp(folder):
    rows = [  # id, type, statement, colour of the row's image
        (1, "Color and Appearance", "a red thing", "red"), (2, "Color and Appearance", "a blue thing", "blue"),
        (3, "Color and Appearance", "a green thing", "red"), (4, "Color and Appearance", "a red thing", "green"),
        (5, "Texts", "green", "green"), (6, "Texts", "red", "red"),
    ]  # fmt: skip
    lines = ["Question ID,Type,Statement"]
    for number, kind, statement, colour in rows:
        place = folder / "MLLM_VLM Images" / kind
        place.mkdir(parents=True, exist_ok=True)
        _picture(colour).save(place / f"{number}.jpg", quality=100)
        lines.append(f"{number},{kind},{statement}")
    (folder / "Questions.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_mmvp(tmp_path):
    """The second pair has its images swapped, hence both statements wrong."""
    result = mmvp(_subject(), str(_mmvp(tmp_path)), pairs_per_category=2)
    assert result.metrics == pytest.approx({"mmvp/average": 75, "mmvp/color_and_appearance": 50, "mmvp/texts": 100})
    assert mmvp(_subject(), None).notes[0].startswith("MMVP left out")


def test_mmvp_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match="no Questions.csv"):
        mmvp(_subject(), str(tmp_path))
    root = _mmvp(tmp_path)
    (root / "MLLM_VLM Images/Texts/6.jpg").unlink()
    with pytest.raises(UserError, match="line 7: there is no image"):
        mmvp(_subject(), str(root))
    (root / "Questions.csv").write_text("Question ID,Type,Statement\n1,Texts,red\n")
    with pytest.raises(UserError, match="has 1 rows"):
        mmvp(_subject(), str(root))


# ---- k-NN ------------------------------------------------------------------------------------------------------------


def test_knn_equals_scikit_learn():
    g = torch.Generator().manual_seed(0)
    data = {
        name: (torch.randn(n, 5, generator=g), torch.randint(-1, 3, (n,), generator=g))
        for name, n in (("train", 60), ("test", 30))
    }
    split = _subject(labels=data["test"][1], class_names=["a", "b", "c"], labelled_features=data.__getitem__)
    result = knn(split, ks=(1, 7, 100))
    (x, y), (xt, yt) = ((F.normalize(a[b >= 0], dim=1).numpy(), b[b >= 0].numpy()) for a, b in data.values())
    for k in (1, 7):
        # For unit vectors exp(cosine / t) is exp(-distance^2 / 2t) up to a factor.
        model = KNeighborsClassifier(k, weights=lambda d: np.exp(-(d**2) / 2 / 0.07)).fit(x, y)
        assert result.metrics[f"knn/top1@{k}"] == pytest.approx(100 * (model.predict(xt) == yt).mean())
    majority = np.bincount(y).argmax()
    assert result.baselines["most frequent class"]["knn/top1@7"] == pytest.approx(100 * (yt == majority).mean())
    assert "all of them vote" in result.notes[0]
    assert knn(_subject()).notes[0].startswith("k-NN left out")


# ---- segmentation ----------------------------------------------------------------------------------------------------


def _predict(split: EmbeddedSplit, file) -> torch.Tensor:
    """The steps one by one, from the best query to its class."""
    image = Image.open(file)
    pixels = prepare(image, 16, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    prompts = ["a photo of a red", "a photo of a blue", "a photo of a green", "a photo of a grey"]
    queries = F.normalize(split.encode_text(prompts), dim=-1)
    encoder = SegmentationEncoder(split.encoders.vision.network)
    logits = sliding_window_logits(encoder, split.encoders.head, pixels, queries, 12, 8, image.size[::-1])
    best = (split.encoders.logit_scale.exp() * logits).argmax(dim=1)[0]
    return torch.tensor([0, 1, 1, 2])[best]


def _dino_subject() -> EmbeddedSplit:
    torch.manual_seed(0)
    network = Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=12, patch_size=4))
    vision = SimpleNamespace(network=network.eval(), pooling="concat", dtype=torch.float32, identity={"name": "tiny"})
    head = AlignmentHead(16, 3, 5, LinearProjector)
    encoders = SimpleNamespace(vision=vision, head=head, device=torch.device("cpu"), logit_scale=head.logit_scale)

    def encode_text(texts):
        return head.encode_text(_Reader().tokenize(texts)["colours"] + 0.1 * torch.tensor([len(t) for t in texts])[:, None])

    split = _subject()
    split.load_encoders, split.encode_text = (lambda: encoders), torch.no_grad()(encode_text)
    return split


LABELS = {
    "ade20k": ("images/validation/{}.jpg", "annotations/validation/{}.png", lambda c: np.where(c == 255, 0, c + 1)),
    "coco_stuff": ("images/val2017/{}.jpg", "annotations/val2017/{}_labelTrainIds.png", lambda c: c),
    "voc20": ("JPEGImages/{}.jpg", "SegmentationClass/{}.png", lambda c: np.where(c == 255, 255, c + 1)),
}


@pytest.mark.parametrize("dataset", LABELS)
def test_segmentation_reads_the_layout_and_counts_what_the_model_says(tmp_path, dataset):
    """The ground truth is made from the model's own answer, with a known part of it wrong or void."""
    images, labels, written = LABELS[dataset]
    classes = tmp_path / "classes.txt"
    classes.write_text("red\nblue, green\n\ngrey\n")
    rng, split = np.random.default_rng(0), _dino_subject()
    settings = {"short_side": 16, "crop": 12, "stride": 8, "classes_file": str(classes)}
    names = ("b", "a")
    for number, name in enumerate(names):
        for path in (images, labels):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20 + number, 30, 3), np.uint8)).save(tmp_path / images.format(name), quality=95)
        Image.fromarray(written(np.zeros((20 + number, 30), np.uint8)).astype(np.uint8)).save(tmp_path / labels.format(name))
    if dataset == "voc20":
        (tmp_path / "ImageSets/Segmentation").mkdir(parents=True)
        (tmp_path / "ImageSets/Segmentation/val.txt").write_text("b\na\n")
    # All ground truth is class 0: its IoU is how often the model says 0, and that of every other class it names is 0.
    result = segmentation(split, dataset, str(tmp_path), **settings)
    predicted = torch.cat([_predict(split, tmp_path / images.format(name)).flatten() for name in names])
    shares = torch.bincount(predicted, minlength=3).double() / len(predicted)
    occurring = int((shares > 0).sum()) + int(shares[0] == 0)
    wanted = 100 * shares[0].item() / occurring
    assert result.metrics[f"segmentation/{dataset}_miou"] == pytest.approx(wanted) and 0 < wanted < 100
    certain = segmentation(split, dataset, str(tmp_path), limit=1, threshold=2.0, **settings)  # nothing is: all class 0
    assert certain.metrics[f"segmentation/{dataset}_miou"] == pytest.approx(100)
    assert "first 1 images" in certain.notes[0]
    assert set(result.hashes) == {"preprocessing", "split", "prompts"}
    assert result.hashes["preprocessing"] != certain.hashes["preprocessing"]
    missing = tmp_path / labels.format("a")
    missing.unlink()
    with pytest.raises(UserError, match="is missing. The official layout|Is the copy complete"):
        segmentation(split, dataset, str(tmp_path), **settings)


def test_segmentation_layouts_give_the_same_classes(tmp_path):
    classes = np.array([[0, 1, 18], [19, 255, 2]], np.uint8)
    for dataset, (_, _, written) in LABELS.items():
        Image.fromarray(written(classes).astype(np.uint8)).save(tmp_path / "map.png")
        layout = benchmarks.SEGMENTATION_LAYOUTS[dataset]
        assert benchmarks.read_label_map(tmp_path / "map.png", layout).tolist() == classes.tolist()


def test_segmentation_is_left_out_with_a_reason(tmp_path):
    assert "voc20 left out" in segmentation(_dino_subject(), "voc20", None, None).notes[0]
    assert "needs a DINOv2" in segmentation(_subject(), "voc20", str(tmp_path), None).notes[0]
    with pytest.raises(UserError, match="val.txt"):
        segmentation(_dino_subject(), "voc20", str(tmp_path), None)


def test_prepare_keeps_the_aspect_and_bounds_the_longer_side():
    image = _picture("red", "blue").resize((60, 30))
    assert prepare(image, 15, (0, 0, 0), (1, 1, 1)).shape == (1, 3, 15, 30)
    assert prepare(image.resize((3000, 10)), 448, (0, 0, 0), (1, 1, 1)).shape[3] == 2048
    pixels = prepare(Image.new("RGB", (8, 8), COLOURS["red"]), 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.25))
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([1.0, -1.0, -2.0]))
