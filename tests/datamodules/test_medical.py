"""Batches of medical images whose texts carry entities, and the simulated world."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from datamodules.entity_linking import EntityLinker, Links
from datamodules.knowledge import Knowledge, Linked
from datamodules.medical import LinkedDataset, MedicalDataModule, entity_keys_of
from datamodules.order import BatchRequest
from datamodules.readers.image_annotations.medical import slake
from datamodules.readers.image_annotations.sample import ImageAnnotations, ImageSample, ImageSource
from datamodules.readers.knowledge import tables
from datamodules.simulated.medical import FINDINGS, questions, unseen, write_medical_world
from datamodules.tokenizers.base import BERT_SPECIALS, TextTokenizer
from datamodules.transforms.vision_language import SquareImage
from models import batch as keys
from models.arl.batch import IMAGE_ENTITIES, TEXT_ENTITIES, entity_keys
from models.arl.graph import NO_ENTITY, Graph
from models.two_tower.batch import FALSE_IMAGE
from tests.datamodules.readers.test_image_annotations import write_image

TASKS = ("mlm", "match", "align", "rank", "answer")
NAMES = [("pleural effusion",), ("mass",), ("lung",)]
CAPTIONS = ("a pleural effusion in the chest is there in the chest is", "mass in the lung", "mass", "the chest")


@pytest.fixture
def data(tmp_path):
    words = "a pleural effusion mass in the lung chest is there ?".split()
    (tmp_path / "vocab.txt").write_text("\n".join([*BERT_SPECIALS, *words]) + "\n")
    samples = []
    for i, caption in enumerate(CAPTIONS):
        write_image(tmp_path / f"{i}.png", ("red", "blue", "lime", "white")[i])
        source = ImageSource(str(tmp_path / f"{min(i, 2)}.png"))
        findings = (1, 0) if i < 2 else (0, 0)
        samples.append(ImageSample(f"{i}", source, min(i, 2), (caption,), "is there mass ?", 0, ((0, 1.0),), findings=findings))
    linker = EntityLinker(NAMES)
    links = Links.of({text: linker(text) for text in (*CAPTIONS, "is there mass ?")})
    linked = Linked(links, Graph([name[0] for name in NAMES], torch.tensor([[0, 2]])), ["E", "M", "L"], linker, {})

    def make(**options):
        settings = {"max_entities": 3, "mask_entities": True, "count_padding": False, **options}
        words = TextTokenizer(str(tmp_path / "vocab.txt"), 16)
        arguments = (words, SquareImage(8), TASKS, True, "dataset", 2)
        return LinkedDataset(ImageAnnotations(samples, ("yes",)), linked, *settings.values(), *arguments)

    return make


def batch_of(dataset, epoch=0):
    return dataset[BatchRequest(np.arange(4), epoch, 0)]


def test_texts_carry_their_entities(data):
    batch = batch_of(data())
    assert {*entity_keys_of(TASKS)} <= set(batch)
    ids, cover = (batch[key] for key in entity_keys("caption"))
    assert ids.tolist() == [[0, NO_ENTITY], [1, 2], [1, NO_ENTITY], [NO_ENTITY] * 2]
    assert cover.shape == (4, 2, 16) and cover[0, 0].nonzero()[:, 0].tolist() == [2, 3] and not cover[3].any()
    assert batch[TEXT_ENTITIES].tolist() == ids.tolist() and batch[IMAGE_ENTITIES][2:].tolist() == [[1, NO_ENTITY]] * 2
    assert batch[entity_keys("question")[0]].tolist() == [[1]] * 4
    assert batch[entity_keys("candidates")[0]].shape[:2] == batch[keys.CANDIDATE_IDS].shape[:2] == (4, 3)
    of_images = data().by_image()[BatchRequest(np.arange(3), 0, 0)]
    assert of_images[entity_keys("all_captions")[0]].shape == (4, 3)  # of every batch, so that batches can be joined
    assert data().texts("question", ["lung is there"])[entity_keys("question")[0]].tolist() == [[2]]  # never seen before


def test_whole_entities_are_masked_and_then_hidden(data):
    hidden = 0
    for epoch in range(40):
        batch = batch_of(data(), epoch)
        chosen = batch[keys.MASKED_LABELS][0] != -100
        assert chosen[2] == chosen[3]  # pleural and effusion
        ids = batch[entity_keys("masked")[0]]
        assert (ids[0] == 0).any() != bool(chosen[2])
        hidden += bool(chosen[2])
    assert 0 < hidden < 20
    of_short = [batch_of(data(count_padding=padding))[keys.MASKED_LABELS][3] != -100 for padding in (False, True)]
    assert [int(chosen.sum()) for chosen in of_short] == [1, 2]  # of two words; officially 15 % of all 16 places
    plain = batch_of(data(mask_entities=False))
    assert plain[entity_keys("masked")[0]].tolist()[0] == [0, NO_ENTITY, NO_ENTITY]


def test_false_images_have_other_findings(data):
    dataset = data()
    for epoch in range(10):
        batch = batch_of(dataset, epoch)
        for row, image in zip((batch[keys.MATCHED] == 0).nonzero()[:, 0].tolist(), batch[FALSE_IMAGE], strict=True):
            others = [keys_row for keys_row in range(4) if (keys_row < 2) != (row < 2)]
            assert any(torch.equal(image, batch[keys.IMAGE][other]) for other in others)


# ---- the simulated world -------------------------------------------------------------------------------------------------


def test_the_world_reads_back_and_hides_diseases_from_training(tmp_path):
    folder = write_medical_world(str(tmp_path), train=12, val=4, test=10, image_size=16)
    assert folder == write_medical_world(str(tmp_path), train=12, val=4, test=10, image_size=16)
    rows = {split: slake(str(folder), split, captions=True) for split in ("train", "val", "test")}
    assert not any(part.skipped for part in rows.values()) and all(sample.captions for sample in rows["train"].samples)
    names = {disease for disease in unseen(3) if any(disease in sample.question for sample in rows["test"].samples)}
    assert names and not any(disease in sample.question for sample in rows["train"].samples for disease in unseen(3))
    patients = [{sample.key.split("_")[1] for sample in part.samples} for part in rows.values()]
    assert not patients[0] & patients[2] and len(patients[0]) == 6
    base = tables(str(folder / "knowledge"))
    linker = EntityLinker(base.names)
    asked = [sample.question for part in rows.values() for sample in part.samples]
    assert not base.skipped and all(linker(text) for text in asked)
    words = TextTokenizer(str(folder / "vocab.txt"), 24)
    assert not (words(asked)[0] == words.tokenizer.unk_token_id).any()


def test_yes_and_no_are_about_equally_frequent():
    rng = np.random.default_rng(0)
    answers = []
    for _ in range(300):
        present = {finding for finding in FINDINGS if rng.random() < 0.3}
        asked = questions(present, {finding: [f"disease of {finding}"] for finding in FINDINGS}, rng)
        answers += [question.answer for question in asked if question.kind == "closed"]
        assert all(question.answer for question in asked)
    assert 0.35 < answers.count("yes") / len(answers) < 0.5


def test_datamodule_gives_the_graph(tmp_path):
    knowledge = Knowledge(tables, str(tmp_path / "cache"), min_count=-1)
    transform = SquareImage(8)
    made = MedicalDataModule(
        knowledge, root=str(tmp_path / "simulated"), annotations={"questions": partial(slake, captions=True)},
        tasks=("answer", "align"), train_transform=transform, transform=transform, text_length=24, num_workers=0, batch_size=4,
        simulate=lambda root: write_medical_world(root, train=12, val=4, test=10, image_size=16),
    )  # fmt: skip
    made.prepare_data()
    made.setup()
    graph = made.facts()["graph"]
    assert len(graph.names) == 46 and len(graph.triples) == 45 and graph.vectors is None
    assert set(made.provides) <= set(next(iter(made.train_dataloader())))
    assert json.loads(json.dumps(made.linked.report))["entities"] == 46
    hashes = made.hashes
    made.linked.identifiers.reverse()  # other entities behind the same numbers
    assert made.hashes.keys() == hashes.keys() and made.hashes != hashes
