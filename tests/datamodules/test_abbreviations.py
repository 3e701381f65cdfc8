"""Abbreviations that a text defines."""

import pytest

from datamodules.abbreviations import abbreviations
from datamodules.entity_linking import EntityLinker


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("the heat shock transcription factor (HSF) binds", {"HSF": "heat shock transcription factor"}),
        ("Gcn5-related N-acetyltransferase (GNAT)", {"GNAT": "Gcn5-related N-acetyltransferase"}),
        ("thyroid nuclear factor 1 (TNF-1), and more", {"TNF-1": "thyroid nuclear factor 1"}),
        ("thyroid transcription factor 1 (TTF-1)", {"TTF-1": "transcription factor 1"}),  # the shortest match
        ("HSP (heat shock protein) is long", {"HSP": "heat shock protein"}),
        ("cyclophilin seven suppressor (CNS1)", {}),  # the digit has no match
        ("magnetic resonance imaging (MRI; 3 T) and computed tomography (CT).", {
            "MRI": "magnetic resonance imaging", "CT": "computed tomography",
        }),
        ("No mass. Enlarged (see arrow)", {}),
        ("seen in the (a) left and (b) right lung (12) (  )", {}),
        ("Heart. Failure (HF)", {}),  # the first letter stands in another sentence
        ("", {}),
    ],
)  # fmt: skip
def test_definitions(text, pairs):
    assert abbreviations(text) == pairs


def test_short_forms_stand_for_the_entity_of_their_long_form():
    names = (("pleural effusion",), ("PE", "pulmonary embolism"), ("chest CT",), ("computed tomography",))
    text = "Pleural effusions (PE) on computed tomography (CT). PE grew; chest CT and CT."

    def named(linker, text=text):
        return [(text[start:end], entity) for start, end, entity in linker(text)]

    without, resolving = EntityLinker(names), EntityLinker(names, abbreviations=True)
    assert without.identity != resolving.identity and ("PE", 1) in named(without)
    assert named(resolving) == [
        ("Pleural effusions", 0), ("PE", 0), ("computed tomography", 3), ("CT", 3), ("PE", 0), ("chest CT", 2), ("CT", 3),
    ]  # fmt: skip
    assert named(resolving, "PE (acute) in CT") == [("PE", 1)]
