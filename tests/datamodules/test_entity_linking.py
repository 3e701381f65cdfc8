"""Linking by the longest name: plurals, capitals, stop words, marks; the cache; the way from texts to a graph."""

import numpy as np
import pytest
import torch

from datamodules.entity_linking import EntityLinker, linked, singular
from datamodules.knowledge import Knowledge, restricted
from datamodules.readers.knowledge import KnowledgeBase, openke, tables, umls
from models.arl.transe import load_vectors
from models.errors import UserError

NAMES = (("pleural effusion", "hydrothorax"), ("effusion",), ("CT", "computed tomography"), ("mass",), ("IT",), ("effusion",))


def names_in(text: str, **options) -> list[tuple[str, int]]:
    return [(text[start:end], entity) for start, end, entity in EntityLinker(NAMES, **options)(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Small pleural effusion.", [("pleural effusion", 0)]),
        ("Effusions, PLEURAL-EFFUSIONS", [("Effusions", 1), ("PLEURAL-EFFUSIONS", 0)]),
        ("pleural, effusion", [("effusion", 1)]),  # a mark parts a name
        ("pleural pleural effusion effusion", [("pleural effusion", 0), ("effusion", 1)]),
        ("CT of ct; Computed tomography: it is IT", [("CT", 2), ("Computed tomography", 2), ("IT", 4)]),
        ("masses, mass", [("masses", 3), ("mass", 3)]),
        ("", []),
        ("pleural", []),
    ],
)
def test_the_longest_name_from_left_to_right(text, found):
    assert names_in(text) == found


def test_stop_names_and_ambiguous_names(tmp_path):
    (tmp_path / "stop.txt").write_text("Mass\n")
    assert names_in("a mass with effusion", stop_file=str(tmp_path / "stop.txt"), stop=("effusions",)) == []
    linker = EntityLinker(NAMES)
    assert linker.ambiguous == 1 and names_in("effusion") == [("effusion", 1)]


@pytest.mark.parametrize(
    ("plural", "one"), [("arteries", "artery"), ("masses", "mass"), ("lungs", "lung"), ("pelvis", "pelvis"), ("gas", "gas")]
)
def test_singular(plural, one):
    assert singular(plural) == one


def test_links_are_computed_once_and_renumbered(tmp_path):
    linker, calls = EntityLinker(NAMES), []

    class Counting:
        identity = linker.identity

        def __call__(self, text):
            calls.append(text)
            return linker(text)

    texts = ["a mass", "no finding", "CT: effusion and mass", "a mass"]
    for _ in range(2):
        links = linked(texts, Counting(), str(tmp_path))
    assert len(calls) == 3 and links["no finding"] == [] and links["CT: effusion and mass"][1] == (4, 12, 1)
    assert links.counts(6).tolist() == [0, 1, 1, 2, 0, 0]
    fewer = links.renumbered(np.array([-1, 0, -1, 1, -1, -1]))
    assert fewer["CT: effusion and mass"] == [(4, 12, 0), (17, 21, 1)] and fewer["a mass"] == [(2, 6, 1)]


def test_the_graph_keeps_frequent_entities_in_the_official_order():
    triples = np.array([[0, 1, 0], [2, 1, 0], [3, 1, 1], [0, 4, 0]])
    base = KnowledgeBase(list("abcde"), [(name,) for name in "abcde"], triples, ["r", "s"])
    numbers, kept = restricted(base, np.array([9, 9, 9, 2, 9]), 2)
    # By triples, then identifier, both descending: a and b have two, e and c one each; d is too rare.
    assert numbers.tolist() == [1, 0, 3, -1, 2] and kept.tolist() == [[1, 0, 0], [3, 0, 0], [1, 2, 0]]


# ---- files -------------------------------------------------------------------------------------------------------------


def write_tables(folder) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "names.tsv").write_text("C1\tpleural effusion\nC1\thydrothorax\nC2\tpleura\nC3\tlung\nbroken\n")
    (folder / "triples.tsv").write_text("C1\tC2\t\tlocation\nC2\tC3\tpart of\nC1\tC9\t\tunknown\nC1\n")


def test_tables(tmp_path):
    write_tables(tmp_path)
    base = tables(str(tmp_path))
    assert base.entities == ["C1", "C2", "C3"] and base.names[0] == ("pleural effusion", "hydrothorax")
    assert base.triples.tolist() == [[0, 1, 0], [1, 2, 1]] and base.relations == ["location", "part of"]
    assert [entry.key for entry in base.skipped] == ["names.tsv, line 5", "triples.tsv, line 4"]


def test_umls(tmp_path):
    def conso(cui, name, language="ENG", preferred="Y", source="MSH", suppress="N"):
        status = "P" if preferred == "Y" else "S"
        return f"{cui}|{language}|{status}|L1|PF|S1|{preferred}|A1||M1|D1|{source}|MH|D1|{name}|0|{suppress}|256|\n"

    rows = [conso("C1", "Hydrothorax", preferred="N"), conso("C1", "Pleural Effusion"), conso("C2", "Pleura")]
    rows += [conso("C2", "Brustfell", language="GER"), conso("C3", "Obsolete", suppress="O"), "C4|ENG\n"]
    (tmp_path / "MRCONSO.RRF").write_text("".join(rows))
    relation = "{}|A1|CUI|RO|{}|A2|CUI|{}|R1||MSH|MSH|||{}||\n"
    lines = [
        relation.format("C2", "C1", "has_location", "N"),
        relation.format("C1", "C2", "x", "Y"),
        relation.format("C2", "C2", "", "N"),
    ]
    (tmp_path / "MRREL.RRF").write_text("".join(lines))
    base = umls(str(tmp_path))
    assert base.entities == ["C1", "C2"] and base.names == [("Pleural Effusion", "Hydrothorax"), ("Pleura",)]
    assert base.triples.tolist() == [[0, 1, 0]] and base.relations == ["has_location"] and len(base.skipped) == 1
    with pytest.raises(UserError, match="META of a release"):
        umls(str(tmp_path / "nowhere"))


def test_official_files(tmp_path):
    (tmp_path / "entity2id.txt").write_text("2\nC7\t1\tlung\nC5\t0\tpleura\n")
    (tmp_path / "relation2id.txt").write_text("1\nlocation_of\t0\n")
    (tmp_path / "train2id.txt").write_text("2\n0\t1\t0\n1\t0\t0\n")
    torch.save(
        {"ent_embeddings.weight": torch.ones(2, 4), "rel_embeddings.weight": torch.ones(1, 4)}, tmp_path / "ent_embeddings.ckpt"
    )
    base = openke(str(tmp_path))
    assert base.numbered and base.entities == ["C5", "C7"] and base.triples.tolist() == [[0, 1, 0], [1, 0, 0]]
    path = str(tmp_path / "ent_embeddings.ckpt")
    assert load_vectors(torch.from_numpy(base.triples), 2, 1, path).shape == (2, 4)
    with pytest.raises(UserError, match="of 3 entities"):
        load_vectors(torch.from_numpy(base.triples), 3, 1, path)
    knowledge = Knowledge(openke, str(tmp_path / "cache"), str(tmp_path))
    result = knowledge.of(tmp_path, {"train": ["the lung"]}, {"the lung": [(4, 8, 1)]})
    assert result.graph.names == ["pleura", "lung"] and result.link("pleura and lungs") == [(0, 6, 0), (11, 16, 1)]
    with pytest.raises(UserError, match="belongs to other data"):
        knowledge.of(tmp_path, {"train": ["x"]}, {"x": [(0, 1, 2)]})
    (tmp_path / "train2id.txt").write_text("3\n0\t1\t0\n")
    with pytest.raises(UserError, match="is the file complete"):
        openke(str(tmp_path))


def test_texts_decide_on_the_graph(tmp_path):
    write_tables(tmp_path / "knowledge")
    texts = {"train": ["hydrothorax and pleura"] * 3 + ["lungs"], "test": ["lung"] * 9}
    result = Knowledge(tables, str(tmp_path / "cache"), min_count=1).of(tmp_path, texts, None)
    assert result.identifiers == ["C2", "C1"] and result.graph.triples.tolist() == [[1, 0]]
    assert result.links["hydrothorax and pleura"] == [(0, 11, 1), (16, 22, 0)] and result.links["lung"] == []
    with pytest.raises(UserError, match="lower knowledge.min_count"):
        Knowledge(tables, str(tmp_path / "cache"), min_count=5).of(tmp_path, texts, None)
    everything = Knowledge(tables, str(tmp_path / "cache"), min_count=1, count="all").of(tmp_path, texts, None)
    assert everything.identifiers == ["C2", "C3", "C1"]
