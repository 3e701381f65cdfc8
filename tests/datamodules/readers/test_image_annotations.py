"""Readers of images with captions and questions, on small files of exactly the official layouts."""

import io
import json

import pyarrow
import pytest
from PIL import Image

from datamodules.readers.base import BadSample
from datamodules.readers.image_annotations.captions import arrow_captions, karpathy, visual_genome
from datamodules.readers.image_annotations.pairs import arrow_nlvr2, arrow_snli, nlvr2, snli_ve
from datamodules.readers.image_annotations.questions import arrow_questions, vg_qa, vqa_v2
from datamodules.readers.image_annotations.sample import UNKNOWN, MissingSplit
from datamodules.readers.image_annotations.web import conceptual_captions, sbu
from datamodules.vision_language import check_copy
from models.errors import UserError


def picture(colour: str = "red", size: int = 8) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(data, "PNG")
    return data.getvalue()


def write_image(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(colour))


def write_arrow(path, **columns):
    table = pyarrow.table(columns)
    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.RecordBatchFileWriter(sink, table.schema) as writer:
        writer.write_table(table)


def vqa_files(root, part, questions, answers=None):
    folder = "test2015" if part.startswith("test") else part
    asked = [{"image_id": image, "question": text, "question_id": number} for number, (image, text) in enumerate(questions)]
    (root / f"v2_OpenEnded_mscoco_{part}_questions.json").write_text(json.dumps({"questions": asked}))
    for image, _ in questions:
        write_image(root / folder / f"COCO_{folder}_{image:012d}.jpg")
    if answers is not None:
        entries = [
            {
                "question_id": number, "image_id": questions[number][0], "multiple_choice_answer": given[0],
                "answer_type": "other", "question_type": "what", "answers": [{"answer": answer} for answer in given],
            }
            for number, given in enumerate(answers)
        ]  # fmt: skip
        (root / f"v2_mscoco_{part}_annotations.json").write_text(json.dumps({"annotations": entries}))


@pytest.fixture
def vqa(tmp_path):
    train = [(1, "what is it?"), (1, "what colour?"), (2, "how many?"), (2, "why?")]
    answers = [["A Cat."] * 10, ["red"] * 3 + ["blue"] * 7, ["two"] * 2 + ["2"] + ["red"] * 7, ["because"] * 10]
    vqa_files(tmp_path, "train2014", train, answers)
    vqa_files(tmp_path, "val2014", [(3, "what is it?")], [["cat"] * 10])
    vqa_files(tmp_path, "test2015", [(4, "and this?")])
    return tmp_path


def test_vqa_v2(vqa):
    rows = vqa_v2(str(vqa), "train", min_count=1)
    # The first answer of each question is its multiple-choice answer here.
    assert rows.answers == ("cat", "red", "2", "because")
    assert [sample.scores for sample in rows.samples] == [((0, 1.0),), ((1, 0.9),), ((2, 0.9), (1, 1.0)), ((3, 1.0),)]
    assert [sample.answer for sample in rows.samples] == [0, 1, 1, 3] and [s.medium for s in rows.samples] == [0, 0, 1, 1]
    assert rows.samples[0].image.open().size == (8, 8) and rows.samples[0].group == "other"
    assert [sample.number for sample in rows.samples] == [0, 1, 2, 3]
    kept = vqa_v2(str(vqa), "train", min_count=2)
    assert kept.answers == ("cat",) and len(kept.samples) == 1  # the others have no answer in the vocabulary
    with pytest.raises(MissingSplit):
        vqa_v2(str(vqa), "val")


def test_vqa_v2_as_officially_split(vqa):
    parts = {"train": ["train2014", "val2014"], "val": ["val2014"], "test": ["test2015"]}
    train, val, test = (vqa_v2(str(vqa), split, parts, min_count=1) for split in ("train", "val", "test"))
    assert len(train.samples) == 5 and train.samples[-1].medium == 2
    assert len(val.samples) == 1 and test.samples[0].answer == UNKNOWN and test.samples[0].scores == ()


def test_vqa_v2_says_what_is_missing(vqa):
    (vqa / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(UserError, match="v2_mscoco_val2014_annotations.json"):
        vqa_v2(str(vqa), "test", min_count=1)


def said(*texts):
    return [{"raw": text} for text in texts]


def test_a_copy_is_checked(vqa):
    complete = check_copy("questions.vqa_v2", str(vqa))
    assert complete == ["train: no sample can be used"]  # no answer occurs nine times here
    (vqa / "val2014" / "COCO_val2014_000000000003.jpg").unlink()
    (problem,) = [line for line in check_copy("questions.vqa_v2", str(vqa)) if "missing" in line]
    assert problem.startswith("test: 1 of 1 images are missing")
    (vqa / "v2_mscoco_val2014_annotations.json").unlink()
    assert any("v2_mscoco_val2014_annotations.json" in line for line in check_copy("questions.vqa_v2", str(vqa)))


def karpathy_file(root, **more):
    images = [
        {"filename": "a.jpg", "filepath": "val2014", "split": "restval", "sentences": said("one", "two", "one ")},
        {"filename": "b.jpg", "filepath": "val2014", "split": "test", "sentences": said("three")},
        {"filename": "c.jpg", "filepath": "val2014", "split": "train", "sentences": said("  ")},
    ]  # fmt: skip
    (root / "dataset_coco.json").write_text(json.dumps({"images": images, **more}))
    write_image(root / "val2014" / "a.jpg")


def test_karpathy(tmp_path):
    karpathy_file(tmp_path)
    rows = karpathy(str(tmp_path), "train")
    assert [sample.captions for sample in rows.samples] == [("one",), ("two",)]  # repetitions go, order stays
    assert len(rows.skipped) == 1 and "no caption" in rows.skipped[0].reason
    assert rows.samples[0].image.open().size == (8, 8)
    assert [s.captions for s in karpathy(str(tmp_path), "val", parts={"val": ["test"]}).samples] == [("three",)]
    with pytest.raises(UserError, match="dataset_flickr30k.json"):
        karpathy(str(tmp_path), "train", "flickr30k")


def test_captions_of_the_questions_images(vqa):
    images = [{"filename": "COCO_train2014_000000000001.jpg", "split": "train", "sentences": [{"raw": "a cat"}]}]
    (vqa / "karpathy").mkdir()
    (vqa / "karpathy" / "dataset_coco.json").write_text(json.dumps({"images": images}))
    rows = vqa_v2(str(vqa), "train", min_count=1, captions="coco")
    assert [sample.captions for sample in rows.samples] == [("a cat",), ("a cat",), (), ()]


def test_visual_genome(tmp_path, vqa):
    regions = [{"id": 7, "regions": [{"image_id": 7, "phrase": "a tail"}, {"image_id": 7, "phrase": "grass"}]}]
    (tmp_path / "region_descriptions.json").write_text(json.dumps(regions))
    write_image(tmp_path / "VG_100K_2" / "7.jpg")
    rows = visual_genome(str(tmp_path), "train")
    assert [sample.captions for sample in rows.samples] == [("a tail",), ("grass",)]
    assert rows.samples[0].image.open().size == (8, 8)
    asked = [{"qas": [{"image_id": 7, "qa_id": 1, "question": "what?", "answer": "Cat."},
                      {"image_id": 7, "qa_id": 2, "question": "why?", "answer": "never seen"}]}]  # fmt: skip
    (tmp_path / "question_answers.json").write_text(json.dumps(asked))
    rows = vg_qa(str(tmp_path), "train", str(vqa), min_count=1)
    assert [(sample.question, sample.answer, sample.scores) for sample in rows.samples] == [("what?", 0, ((0, 1.0),))]


def test_snli_ve(tmp_path):
    lines = [
        {"Flickr30K_ID": "12", "sentence1": "p", "sentence2": "a dog", "gold_label": "entailment"},
        {"Flickr30K_ID": "12", "sentence1": "p", "sentence2": "a cat", "gold_label": "contradiction"},
        {"Flickr30K_ID": "13", "sentence1": "p", "sentence2": "a cow", "gold_label": "-"},
    ]
    (tmp_path / "snli_ve_dev.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_image(tmp_path / "flickr30k_images" / "12.jpg")
    rows = snli_ve(str(tmp_path), "val")
    assert [(s.question, s.answer, s.medium) for s in rows.samples] == [("a dog", 2, 0), ("a cat", 0, 0)]
    assert rows.answers == ("contradiction", "neutral", "entailment") and len(rows.skipped) == 1


def test_nlvr2(tmp_path):
    (tmp_path / "data").mkdir()
    line = {"identifier": "train-10171-0-0", "sentence": "two dogs", "label": "True", "directory": 31}
    (tmp_path / "data" / "train.json").write_text(json.dumps(line))
    for i, colour in enumerate(("red", "blue")):
        write_image(tmp_path / "images" / "train" / "31" / f"train-10171-0-img{i}.png", colour)
    (sample,) = nlvr2(str(tmp_path), "train").samples
    assert sample.answer == 1 and sample.image.open().getpixel((0, 0)) == (255, 0, 0)
    assert sample.second.open().getpixel((0, 0)) == (0, 0, 255)
    (tmp_path / "data" / "dev.json").write_text(json.dumps({**line, "identifier": "dev-1-2-3", "label": "False"}))
    (sample,) = nlvr2(str(tmp_path), "val").samples
    assert sample.image.path.endswith("images/dev/dev-1-2-img0.png") and sample.answer == 0


def test_arrow_captions(tmp_path):
    write_arrow(tmp_path / "a.arrow", image=[picture("red"), picture("blue")], caption=[["one", "two"], ["three"]])
    write_arrow(tmp_path / "b.arrow", image=[picture("lime"), b"damaged"], caption=[["four"], []])
    rows = arrow_captions(str(tmp_path), "train", {"train": ["a", "b"]})
    assert [(s.captions[0], s.medium) for s in rows.samples] == [("one", 0), ("two", 0), ("three", 1), ("four", 2)]
    assert rows.samples[3].image.open().getpixel((0, 0)) == (0, 255, 0) and len(rows.skipped) == 1
    with pytest.raises(BadSample):
        rows.samples[3].image._replace(row=1).open()


def test_arrow_questions(tmp_path):
    write_arrow(
        tmp_path / "vqav2_train_fix.arrow", image=[picture()], questions=[["what?", "why?"]], question_id=[[5, 6]],
        answers=[[["cat", "dog"], ["because"]]], answer_labels=[[[2, 0], [1]]], answer_scores=[[[0.3, 1.0], [0.9]]],
    )  # fmt: skip
    write_arrow(tmp_path / "vqav2_test.arrow", image=[picture()], questions=[["what?"]], question_id=[[9]])
    parts = {"train": ["vqav2_train_fix"], "test": ["vqav2_test"]}
    train, test = (
        arrow_questions(str(tmp_path), split, parts, vocabulary_parts=["vqav2_train_fix"], classes=4)
        for split in ("train", "test")
    )
    assert train.answers == ("dog", "because", "cat", "unknown")
    assert [(s.answer, s.scores, s.number) for s in train.samples] == [(0, ((2, 0.3), (0, 1.0)), 5), (1, ((1, 0.9),), 6)]
    assert [(s.answer, s.scores, s.number) for s in test.samples] == [(UNKNOWN, (), 9)]


def test_arrow_pairs(tmp_path):
    write_arrow(tmp_path / "snli_dev.arrow", image=[picture()], sentences=[[["p", "h1"], ["p", "h2"]]], labels=[[2, 0]])
    assert [(s.question, s.answer) for s in arrow_snli(str(tmp_path), "val").samples] == [("h1", 2), ("h2", 0)]
    write_arrow(
        tmp_path / "nlvr2_test1.arrow", image_0=[picture("red")], image_1=[picture("blue")], questions=[["q1", "q2"]],
        answers=[["True", "False"]], identifier=[["test1-0-0-0", "test1-0-0-1"]],
    )  # fmt: skip
    first, second = arrow_nlvr2(str(tmp_path), "test").samples
    assert (first.answer, second.answer, second.number) == (1, 0, "test1-0-0-1")
    assert first.second.open().getpixel((0, 0)) == (0, 0, 255)


def test_conceptual_captions(tmp_path):
    """Images bear the number of their row; rows whose image could not be fetched are left out."""
    rows = ['a "dog\thttp://x/0', "gone\thttp://x/1", "  \thttp://x/2", "a cat\thttp://x/3"]
    (tmp_path / "Train_GCC-training.tsv").write_text("\n".join(rows) + "\n")
    for name in ("0_123", "0000/0000002.png", "0000/0000003.png", "list.txt"):
        write_image(tmp_path / "training" / name)
    train = conceptual_captions(str(tmp_path), "train")
    assert [sample.captions for sample in train.samples] == [('a "dog',), ("a cat",)]
    assert [sample.medium for sample in train.samples] == [0, 3] and train.samples[1].image.open().size == (8, 8)
    assert len(train.skipped) == 1 and "no caption" in train.skipped[0].reason
    problems = check_copy("web.conceptual_captions", str(tmp_path))
    assert any("Validation_GCC-1.1.0-Validation.tsv" in line for line in problems)


def test_sbu(tmp_path):
    content = {"captions": ["a boat", "gone", 7], "image_urls": ["http://x/0", "http://x/1", "http://x/2"]}
    (tmp_path / "sbu-captions-all.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="number of its entry"):
        sbu(str(tmp_path), "train")
    write_image(tmp_path / "sbu" / "0000000.jpg")
    write_image(tmp_path / "sbu" / "0000002.jpg")
    rows = sbu(str(tmp_path), "train")
    assert [(sample.key, sample.captions) for sample in rows.samples] == [("sbu/0", ("a boat",))]
    assert len(rows.skipped) == 1 and check_copy("web.sbu", str(tmp_path))[0].startswith("train: 1 records are unusable")
    with pytest.raises(MissingSplit):
        sbu(str(tmp_path), "val")
