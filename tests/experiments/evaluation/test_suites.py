"""Evaluation suites on embeddings whose answers are known, against slow plain forms and scikit-learn."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from experiments.evaluation.base import EmbeddedSplit
from experiments.evaluation.retrieval import retrieval
from experiments.evaluation.zero_shot import zero_shot
from models.captions import clean_caption
from models.encoders.preprocess import ImagePreprocess
from models.errors import UserError

WORDS = ["red", "green", "blue", "pink", "grey", "navy", "mint"]


def _encode_text(texts: list[str]) -> torch.Tensor:
    """A bag of known words, with a little of each text's own direction so that templates differ."""
    rows = []
    for text in texts:
        row = 0.05 * torch.randn(len(WORDS), generator=torch.Generator().manual_seed(len(text)))
        for word in text.split():
            if word in WORDS:
                row[WORDS.index(word)] += 1
        rows.append(row)
    return torch.stack(rows) * 7  # the length must not matter


def _split(images: int = 40, noise: float = 0.4) -> EmbeddedSplit:
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, len(WORDS), (images,), generator=g)
    owner = torch.arange(images).repeat_interleave(torch.randint(1, 4, (images,), generator=g))
    image = F.one_hot(labels, len(WORDS)).float() + noise * torch.randn(images, len(WORDS), generator=g)
    text = image[owner] + noise * torch.randn(len(owner), len(WORDS), generator=g)
    captions = [f"caption {row} of image {int(own)}" for row, own in enumerate(owner)]
    return EmbeddedSplit(image, text, owner, captions, _encode_text, lambda row: None, labels, WORDS, {"split": "abc"})


def test_zero_shot_equals_scikit_learn():
    split, templates = _split(noise=0.8), ["a {}", "a photo of a {} thing", "{}"]
    result = zero_shot(split, templates)
    classes = []
    for name in WORDS:
        prompts = [F.normalize(_encode_text([t.format(name)])[0], dim=0) for t in templates]
        classes.append(F.normalize(sum(prompts) / len(prompts), dim=0))
    scores = (F.normalize(split.image, dim=1) @ torch.stack(classes).T).numpy()
    labels = split.labels.numpy()
    for k in (1, 5):
        expected = 100 * top_k_accuracy_score(labels, scores, k=k, labels=range(len(WORDS)))
        assert result.metrics[f"zeroshot/top{k}"] == pytest.approx(expected)
        assert result.baselines["chance"][f"zeroshot/top{k}"] == pytest.approx(100 * k / len(WORDS))
    assert result.metrics["zeroshot/balanced"] == pytest.approx(100 * balanced_accuracy_score(labels, scores.argmax(1)))
    matrix, _names = result.figures["confusion"].args
    assert matrix.sum() == len(labels) and matrix.diagonal().sum() == (scores.argmax(1) == labels).sum()
    assert result.hashes["split"] == "abc" and result.hashes["prompts"] != zero_shot(split, ["a {}"]).hashes["prompts"]


def test_most_frequent_class_stands_beside_zero_shot():
    split = _split()
    column = zero_shot(split, ["a {}"]).baselines["most frequent class"]
    counts = torch.bincount(split.labels, minlength=len(WORDS)).double()
    assert column["zeroshot/top1"] == pytest.approx(100 * float(counts.max() / counts.sum()))
    assert column["zeroshot/top5"] == pytest.approx(100 * float(counts.sort(descending=True).values[:5].sum() / counts.sum()))
    assert column["zeroshot/balanced"] == pytest.approx(100 / int((counts > 0).sum()))


def test_zero_shot_leaves_out_what_has_no_label():
    split = _split()
    known = zero_shot(split, ["a {}"])
    split.labels = torch.cat([split.labels, torch.full((10,), -1)])
    split.image = torch.cat([split.image, torch.randn(10, len(WORDS))])
    assert zero_shot(split, ["a {}"]).metrics == known.metrics
    split.labels = torch.full((50,), -1)
    nothing = zero_shot(split, ["a {}"])
    assert nothing.metrics == {} and "no classes" in nothing.notes[0]


def test_zero_shot_templates(tmp_path):
    file = tmp_path / "templates.txt"
    file.write_text("a {}\n\n  a photo of a {}\n")
    split = _split()
    from_file = zero_shot(split, [], templates_file=str(file))
    assert from_file.hashes["prompts"] == zero_shot(split, ["a {}", "a photo of a {}"]).hashes["prompts"]
    assert zero_shot(split, ["a {} in {braces}"]).metrics  # only {} is a slot
    for wrong in (["a thing"], ["{} and {}"], []):
        with pytest.raises(UserError, match="exactly one"):
            zero_shot(split, wrong)
    with pytest.raises(UserError, match="absent.txt"):
        zero_shot(split, [], templates_file=str(tmp_path / "absent.txt"))


def test_zero_shot_with_several_sets_and_descriptions(tmp_path):
    split, descriptions = (
        _split(noise=0.8),
        {name: [f"{name} {'thing ' * i}" for i in range(1, 3 + n)] for n, name in enumerate(WORDS)},
    )
    (tmp_path / "set.txt").write_text("a photo of a {c}\n{c}\n")
    (tmp_path / "words.json").write_text(json.dumps(dict(reversed(descriptions.items()))))
    result = zero_shot(split, ["a {}"], None, {"mine": str(tmp_path / "set.txt")}, str(tmp_path / "words.json"))
    alone = zero_shot(split, ["a photo of a {}", "{}"])
    assert result.metrics["zeroshot/top1"] == zero_shot(split, ["a {}"]).metrics["zeroshot/top1"]
    assert result.metrics["zeroshot_mine/top1"] == alone.metrics["zeroshot/top1"]
    assert result.hashes["prompts_mine"] == alone.hashes["prompts"]
    vectors = [F.normalize(F.normalize(_encode_text(descriptions[n]), dim=1).mean(0), dim=0) for n in WORDS]
    right = (F.normalize(split.image, dim=1) @ torch.stack(vectors).T).argmax(1) == split.labels
    assert result.metrics["zeroshot_descriptions/top1"] == pytest.approx(100 * right.double().mean().item())
    (tmp_path / "words.json").write_text(json.dumps({"red": ["a"]}))
    with pytest.raises(UserError, match="describes 1 classes, but not"):
        zero_shot(split, ["a {}"], descriptions_file=str(tmp_path / "words.json"))
    (tmp_path / "words.json").write_text(json.dumps({"red": "a"}))
    with pytest.raises(UserError, match="list of prompts"):
        zero_shot(split, ["a {}"], descriptions_file=str(tmp_path / "words.json"))


def _official_top1(split: EmbeddedSplit, prompts: list[list[str]], pad_to: int, k_test: int) -> float:
    """freeze-align's rule, prompt by prompt and image by image: pad with the first, average unit vectors, do not normalise
    again, and set all but the k_test best scores of an image to -100."""
    vectors = []
    for own in prompts:
        filled = own + [own[0]] * (pad_to - len(own))  # a negative number of copies is none
        total = torch.zeros(split.image.shape[1])
        for prompt in filled:
            vector = split.encode_text([prompt])[0]
            total += vector / vector.norm()
        vectors.append(total / len(filled))
    right = 0
    for image, label in zip(split.image, split.labels.tolist(), strict=True):
        scores = [float(image @ vector / image.norm()) for vector in vectors]
        kept = sorted(range(len(scores)), key=lambda c: -scores[c])[:k_test]
        filtered = [score if c in kept else -100.0 for c, score in enumerate(scores)]
        right += max(range(len(filtered)), key=lambda c: filtered[c]) == label
    return 100 * right / len(split.image)


def test_descriptive_prompts_by_the_official_rule(tmp_path):
    split, g = _split(images=600, noise=0.9), torch.Generator().manual_seed(1)
    prompts = []
    for name in WORDS:  # the first prompt speaks of two classes; some lists are longer than what they are filled up to
        others = [WORDS[i] for i in torch.randint(len(WORDS), (8,), generator=g).tolist()]
        count = int(torch.randint(1, 9, (1,), generator=g))
        prompts.append([f"{name} {others[0]}", *(f"{name} {name} {other}" for other in others[1:count])])
    assert min(map(len, prompts)) < 5 < max(map(len, prompts))
    by_number = {f"n{number:08d}": own for number, own in enumerate(prompts)}  # WordNet ids, whose order is that of the labels
    (tmp_path / "words.json").write_text(json.dumps(by_number))
    arguments = (split, ["a {}"], None, None, str(tmp_path / "words.json"))
    official = zero_shot(*arguments, descriptions_order="file", descriptions_pad_to=5, descriptions_normalise=False)
    assert official.metrics["zeroshot_descriptions/top1"] == pytest.approx(_official_top1(split, prompts, 5, k_test=3))
    plain = zero_shot(*arguments, descriptions_order="file")
    padded = zero_shot(*arguments, descriptions_order="file", descriptions_pad_to=5)
    unequal = zero_shot(*arguments, descriptions_order="file", descriptions_normalise=False)
    for changed in (official, padded, unequal):  # each switch decides something here
        assert changed.metrics["zeroshot_descriptions/top1"] != plain.metrics["zeroshot_descriptions/top1"]
    assert plain.metrics["zeroshot/top1"] == official.metrics["zeroshot/top1"]  # and nothing about other prompts
    with pytest.raises(UserError, match="but not"):
        zero_shot(*arguments)
    (tmp_path / "words.json").write_text(json.dumps({name: by_number[name] for name in list(by_number)[1:]}))
    with pytest.raises(UserError, match="describes 6 classes, but the data has 7"):
        zero_shot(*arguments, descriptions_order="file")


def test_official_pixel_statistics_encode_the_pictures_anew():
    split = _split()
    split.load_image = lambda row: row

    class Encoders:
        preprocess = ImagePreprocess((2, 2), None)

        def embed_images(self, images, preprocess):
            assert (preprocess.mean, preprocess.std) == (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) and preprocess.size == (2, 2)
            return -split.image[list(images)]

    split.load_encoders = Encoders
    own, clip = (zero_shot(split, ["a {}"], statistics=name) for name in ("own", "clip"))
    assert clip.metrics["zeroshot/top1"] < own.metrics["zeroshot/top1"]
    assert clip.hashes["preprocessing"] != own.hashes.get("preprocessing")


def test_retrieval_equals_a_sorted_list():
    split = _split()
    result = retrieval(split, ks=(1, 5))
    scores = F.normalize(split.image, dim=1) @ F.normalize(split.text, dim=1).T
    owner = split.owner.tolist()
    best = {"i2t": [], "t2i": []}  # position of the first right candidate
    for row in range(len(split.image)):
        order = scores[row].argsort(descending=True).tolist()
        best["i2t"].append(next(i for i, text in enumerate(order) if owner[text] == row))
    for column, own in enumerate(owner):
        best["t2i"].append(scores[:, column].argsort(descending=True).tolist().index(own))
    for name, k in itertools.product(best, (1, 5)):
        expected = 100 * sum(rank < k for rank in best[name]) / len(best[name])
        assert result.metrics[f"retrieval/{name}_recall@{k}"] == pytest.approx(expected)
    assert result.metrics["retrieval/i2t_median_rank"] == sorted(best["i2t"])[19] + 1


def test_retrieval_chance_is_exact():
    """Three images with 1, 2 and 1 captions: over all orders, a random one finds an own caption at place one for 4/12."""
    split = _split(3)
    split.owner, split.text = torch.tensor([0, 1, 1, 2]), torch.randn(4, len(WORDS))
    split.captions = ["a", "b", "c", "d"]
    chance = retrieval(split, ks=(1, 2)).baselines["chance"]
    orders = list(itertools.permutations(range(4)))
    for k in (1, 2):
        hits = [any(split.owner[c] == i for c in order[:k]) for order in orders for i in range(3)]
        assert chance[f"retrieval/i2t_recall@{k}"] == pytest.approx(100 * sum(hits) / len(hits))
        assert chance[f"retrieval/t2i_recall@{k}"] == pytest.approx(100 * k / 3)


def test_retrieval_examples_name_the_right_answers():
    split = _split(noise=0.0)
    split.image = torch.eye(len(WORDS))
    split.owner, split.text = torch.arange(len(WORDS)), torch.eye(len(WORDS))
    split.captions, split.labels = WORDS, None
    figures = retrieval(split).figures
    for example in figures["retrieved_images"].args[0]:
        assert example["images"][0] == example["right"] == WORDS.index(example["caption"])
    for example in figures["retrieved_captions"].args[0]:
        assert example["captions"][0] == WORDS[example["image"]]
        assert example["right"] == [True] + [False] * 4


def test_retrieval_with_cleaned_captions():
    """The captions that are encoded anew are those cleaned by the official rule; the same texts, the same result."""
    split = _split()
    split.captions = [f"A {WORDS[i % 7].upper()}, well-known/*thing*: <person>'s {'word ' * i}" for i in range(len(split.text))]
    asked = []

    def encode(texts):
        asked.extend(texts)
        return split.text

    plain = retrieval(split)
    split.encode_text = encode
    cleaned = retrieval(split, cleaned_words=5)
    assert asked[:2] == ["a red well known thing", "a green well known thing"]
    assert all(len(caption.split()) <= 5 for caption in asked) and len(asked) == len(split.captions)
    assert cleaned.metrics == plain.metrics and cleaned.hashes != plain.hashes
    split.text = split.text.flip(0)
    assert retrieval(split, cleaned_words=5).metrics != plain.metrics


def test_clean_caption_by_the_rule_written_out():
    def slowly(text, words):
        text = "".join(c for c in text.lower() if c not in ",.'!?\"()*#:;~")
        text = text.replace("-", " ").replace("/", " ").replace("<person>", "person")
        return " ".join(text.split()[:words])

    for text in ("Two dogs, one (small) cat!", "  <PERSON> & a well-known/old   'thing'...\n", "a b c d e f", "#1: ~3"):
        assert clean_caption(text, 4) == slowly(text, 4)
