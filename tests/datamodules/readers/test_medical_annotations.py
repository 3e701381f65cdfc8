"""Readers of medical images with texts, on small files of exactly the official layouts."""

import json

import pytest

from datamodules.readers.base import BadSample
from datamodules.readers.image_annotations import medical, medical_arrow
from datamodules.readers.image_annotations.sample import UNKNOWN, MissingSplit
from models.errors import UserError
from tests.datamodules.readers.test_image_annotations import picture, write_arrow, write_image


def texts(rows) -> list[tuple[str, ...]]:
    return [sample.texts for sample in rows.samples]


def test_roco(tmp_path):
    for split in medical.SPLITS:
        folder = tmp_path / "roco" / split / "radiology"
        write_image(folder / "images" / "ROCO_1.jpg")
        (folder / "captions.txt").write_text("ROCO_1\tCT of the chest\nROCO_2\n\nROCO_3\t X-ray, \ta mass \n")
    rows = medical.roco(str(tmp_path), "val", folder="roco")
    assert texts(rows) == [("CT of the chest",), ("X-ray, \ta mass",)] and len(rows.skipped) == 1
    assert rows.samples[0].image.open().size == (8, 8)
    official = medical.roco(str(tmp_path / "roco"), "test", retrieval=True)
    assert sorted(texts(official)) == sorted(texts(rows))


def test_medicat(tmp_path, monkeypatch):
    monkeypatch.setattr(medical, "MEDICAT_HELD_OUT", 1)
    path = tmp_path / "release" / "s2_full_figures_oa_nonroco_combined_medical_top4_public.jsonl"
    write_image(tmp_path / "release" / "figures" / "p0_f.png")
    lines = [{"pdf_hash": f"p{i}", "fig_uri": "f.png", "radiology": i != 2, "s2_caption": f"figure {i}"} for i in range(6)]
    lines[0]["s2orc_references"] = ["see the figure", "figure 0"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    parts = {split: medical.medicat(str(tmp_path), split) for split in medical.SPLITS}
    figures = [{sample.key.split("#")[0] for sample in rows.samples} for rows in parts.values()]
    assert [len(of_split) for of_split in figures] == [3, 1, 1] and len(set().union(*figures)) == 5
    assert sum(text in (("see the figure",), ("figure 0",)) for rows in parts.values() for text in texts(rows)) == 2


def test_mimic_cxr(tmp_path):
    heads = {
        "metadata": "dicom_id,subject_id,study_id,ViewPosition", "split": "dicom_id,study_id,subject_id,split",
        "chexpert": "subject_id,study_id,Cardiomegaly,Edema",
    }  # fmt: skip
    bodies = {
        "metadata": ["a,10000032,50414267,PA", "b,10000032,50414267,LATERAL", "c,10000033,50414268,AP", "d,10000034,9,PA"],
        "split": ["a,50414267,10000032,train", "b,50414267,10000032,train", "c,50414268,10000033,validate", "d,9,1,train"],
        "chexpert": ["10000032,50414267,1.0,-1.0", "10000033,50414268,,1.0", "10000034,9,,"],
    }
    for name, head in heads.items():
        (tmp_path / f"mimic-cxr-2.0.0-{name}.csv").write_text("\n".join([head, *bodies[name]]) + "\n")
    reports = ["study,impression,findings", 's50414267,"Large  heart\nis seen.",Lungs clear', 's50414268,,"No acute process."']
    (tmp_path / "mimic_cxr_sectioned.csv").write_text("\n".join(reports) + "\n")
    write_image(tmp_path / "files" / "p10" / "p10000032" / "s50414267" / "a.png")
    train = medical.mimic_cxr(str(tmp_path), "train")
    assert texts(train) == [("Large heart is seen.",)] and train.samples[0].image.open().size == (8, 8)
    assert train.samples[0].findings == tuple(int(name == "Cardiomegaly") for name in medical.CHEXPERT_FINDINGS)
    assert len(train.skipped) == 1  # a study without a report
    val = medical.mimic_cxr(str(tmp_path), "val")
    assert texts(val) == [("No acute process.",)] and sum(val.samples[0].findings) == 1
    with pytest.raises(BadSample):
        val.samples[0].image.open()


def questions_of(image_field: str, extra: list[dict]) -> str:
    common = {image_field: "a.jpg", "q_lang": "en"}
    base = [
        {**common, "qid": 1, "question": "Is it large?", "answer": "Yes", "answer_type": "CLOSED "},
        {**common, "qid": 2, "question": "Which organ?", "answer": "The Lung", "answer_type": "OPEN"},
    ]
    return json.dumps(base + extra)


@pytest.mark.parametrize(
    ("reader", "files", "folder", "field"),
    [
        (medical.vqa_rad, ("trainset.json", "valset.json", "testset.json"), "images", "image_name"),
        (medical.slake, ("train.json", "validate.json", "test.json"), "imgs", "img_name"),
    ],
)
def test_questions_in_json(tmp_path, reader, files, folder, field):
    write_image(tmp_path / folder / "a.jpg")
    more = {field: "b.jpg", "qid": 3, "question": "How many?", "answer": 2, "answer_type": "OPEN", "q_lang": "en"}
    for file in files[::2]:
        (tmp_path / file).write_text(questions_of(field, [more] if file == files[2] else [{"qid": 9, "q_lang": "en"}]))
    train, test = (reader(str(tmp_path), split) for split in ("train", "test"))
    assert train.answers == ("yes", "lung") and [sample.answer for sample in train.samples] == [0, 1]
    assert [sample.group for sample in train.samples] == ["closed", "open"] and len(train.skipped) == 1
    assert [sample.medium for sample in train.samples] == [0, 0] and train.samples[0].image.open().size == (8, 8)
    assert [sample.answer for sample in test.samples] == [0, 1, UNKNOWN] and test.samples[2].scores == ()
    assert reader(str(tmp_path), "test", answers_of=("train", "test")).answers == ("yes", "lung", "2")
    with pytest.raises(MissingSplit):
        reader(str(tmp_path), "val")


def test_slake_takes_one_language_and_captions(tmp_path):
    chinese = {"img_name": "a.jpg", "qid": 3, "question": "?", "answer": "x", "answer_type": "OPEN", "q_lang": "zh"}
    for file in ("train.json", "validate.json", "test.json"):
        (tmp_path / file).write_text(questions_of("img_name", [chinese]))
    (tmp_path / "captions.txt").write_text("a.jpg\ta chest\na.jpg\ta thorax\n")
    rows = medical.slake(str(tmp_path), "val", captions=True)
    assert len(rows.samples) == 2 and rows.samples[1].captions == ("a chest", "a thorax")


def test_medvqa_2019(tmp_path):
    for split in medical.SPLITS:
        (tmp_path / split / "QA").mkdir(parents=True)
        for name in medical.MEDVQA_QUESTIONS:
            (tmp_path / split / "QA" / f"{name}.csv").write_text(f"synpic1|which {name.lower()}?|Axial\nbroken\n")
        (tmp_path / split / "QA" / "Abnormality.csv").write_text("synpic1|what is wrong?|much\n")
    write_image(tmp_path / "test" / "images" / "synpic1.jpg")
    rows = medical.medvqa_2019(str(tmp_path), "test")
    assert [sample.question for sample in rows.samples] == ["which modality?", "which organ?", "which plane?"]
    assert rows.answers == ("axial",) and len(rows.skipped) == 3 and rows.samples[2].image.open().size == (8, 8)


def test_melinda(tmp_path):
    head = "figure_file,caption,i_meth,p_meth,i_meth_label,p_meth_label\n"
    for file, label in (("train", "blot"), ("dev", "assay"), ("test", "blot")):
        (tmp_path / f"{file}.csv").write_text(head + f'a.png,"A blot, of A",x,y,z,{label}\nb.png,B,x,y,z,{label}\n')
    write_image(tmp_path / "melinda_images" / "a.png")
    rows = medical.melinda(str(tmp_path), "test")
    assert rows.answers == ("assay", "blot") and [sample.answer for sample in rows.samples] == [1, 1]
    assert rows.samples[0].question == "A blot, of A" and rows.samples[0].image.open().size == (8, 8)
    with pytest.raises(UserError, match="none of i_meth"):
        medical.melinda(str(tmp_path), "test", label="colour")


def test_arrow_files(tmp_path):
    image = [picture()] * 2
    captions, spans = [["a mass ", " CT"], ["normal"]], [[[[2, 6, 4]], [[1, 3, 7]]], [[]]]
    for name, extra in (("roco", {}), ("mimic_cxr", {"chexpert": [[0, 1], [1, 0]]})):
        columns = {"image": image, "caption": captions, "image_id": ["a", "b"], "img_ents": [[4, 7], []], "txt_ents": spans}
        write_arrow(tmp_path / f"{name}_train.arrow", **columns, **extra, split=["train"] * 2)
    rows = medical_arrow.captions(str(tmp_path), "train", ["roco", "mimic_cxr"])
    assert [sample.medium for sample in rows.samples] == [0, 0, 1, 2, 2, 3]
    assert [sample.findings for sample in rows.samples[2:4]] == [(), (0, 1)]
    assert rows.links == {"a mass": [(2, 6, 4)], "CT": [(0, 2, 7)], "normal": []}

    for split in medical.SPLITS:
        columns = {
            "image": image[:1], "questions": [["large?", "which?"]], "answers": [[["yes"], ["lung"]]],
            "answer_labels": [[[0], [2]]], "answer_scores": [[[1.0], [1.0]]], "image_id": ["a"], "question_id": [[5, 6]],
            "answer_type": [[0, 1]], "img_ents": [[1]], "txt_ents": [[[], [[0, 5, 1]]]], "split": [split],
        }  # fmt: skip
        write_arrow(tmp_path / f"vqa_slack_{split}.arrow", **columns)
    rows = medical_arrow.questions(str(tmp_path), "test", "vqa_slack")
    assert rows.answers == ("yes", "unknown", "lung") and [sample.answer for sample in rows.samples] == [0, 2]
    assert [sample.group for sample in rows.samples] == ["closed", "open"] and rows.links["which?"] == [(0, 5, 1)]

    columns = {"image": image[:1], "caption": [["A", "B"]], "p_meth_label": [[3, 0]], "txt_ents": [[[], []]]}
    write_arrow(tmp_path / "cls_melinda_test.arrow", **columns)
    rows = medical_arrow.melinda(str(tmp_path), "test")
    assert [sample.answer for sample in rows.samples] == [3, 0] and len(rows.answers) == 7
