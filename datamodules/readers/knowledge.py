"""Knowledge bases in their files: names of entities, and triples of a head, a tail and a relation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.readers.text import read_lines
from models.batch import Skipped
from models.errors import UserError

_CONSO_FIELDS, _REL_FIELDS = 18, 16  # of UMLS's MRCONSO.RRF and MRREL.RRF; each line ends with a bar


class KnowledgeBase(NamedTuple):
    """What is known before any text is read.

    Attributes:
        entities: identifiers of the E entities.
        names: of each entity, the preferred one first.
        triples: (T, 3) int64 head, tail, relation.
        relations: names of the relations.
        numbered: other files (Arrow files, entity vectors) count the entities in this order: none is dropped, none moved.
        skipped: lines that cannot be used.
    """

    entities: list[str]
    names: list[tuple[str, ...]]
    triples: NDArray[np.int64]
    relations: list[str]
    numbered: bool = False
    skipped: Sequence[Skipped] = ()


def tables(folder: str, triples: str = "triples.tsv", names: str = "names.tsv") -> KnowledgeBase:
    """Two tables with tabs between their columns.

    Args:
        folder: of the files.
        triples: identifiers of head and tail in the first two columns, the relation in the last one; columns between them are
            not read (``train_umls.txt`` of the official code has this form).
        names: identifier and name; several lines of an identifier are its synonyms, the first one its preferred name.
    """
    skipped: list[Skipped] = []
    known: dict[str, list[str]] = {}
    for identifier, name in _rows(Path(folder, names), 2, skipped):
        known.setdefault(identifier, []).append(name)
    links = [(row[0], row[1], row[-1]) for row in _rows(Path(folder, triples), 3, skipped)]
    return _base({entity: tuple(dict.fromkeys(of_entity)) for entity, of_entity in known.items()}, links, skipped)


def umls(folder: str, language: str = "ENG", sources: Sequence[str] | None = None) -> KnowledgeBase:
    """A subset of UMLS: ``MRCONSO.RRF`` (names) and ``MRREL.RRF`` (relations), as MetamorphoSys writes them.

    A row of MRREL says that its second concept has the relation to the first: the second is the head.

    Args:
        folder: of the files, ``META`` of a release.
        language: of the names.
        sources: abbreviations of vocabularies (SAB) whose names and relations are taken; null: all.
    """
    skipped: list[Skipped] = []
    preferred: dict[str, str] = {}
    known: dict[str, list[str]] = {}
    wanted = None if sources is None else set(sources)
    for row in _bars(Path(folder, "MRCONSO.RRF"), _CONSO_FIELDS, skipped):
        concept, name = row[0], row[14]
        if row[1] != language or row[16] not in ("N", "") or (wanted and row[11] not in wanted):
            continue
        known.setdefault(concept, []).append(name)
        if (row[2], row[4], row[6]) == ("P", "PF", "Y"):  # TS, STT, ISPREF
            preferred.setdefault(concept, name)
    names = {concept: (preferred.get(concept, of[0]), *of) for concept, of in known.items()}
    links = [
        (row[4], row[0], row[7] or row[3])
        for row in _bars(Path(folder, "MRREL.RRF"), _REL_FIELDS, skipped)
        if row[14] in ("N", "") and row[0] != row[4] and (not wanted or row[10] in wanted)
    ]
    return _base({concept: tuple(dict.fromkeys(of)) for concept, of in names.items()}, links, skipped)


def openke(folder: str, synonyms: str | None = None) -> KnowledgeBase:
    """The official files in OpenKE's form: ``entity2id.txt``, ``relation2id.txt``, ``train2id.txt``. The numbers stay.

    Args:
        folder: ``data/knowledge`` of the official code.
        synonyms: further names, a table as ``names`` of :func:`tables`; null: each entity has the one name of the file.
    """
    skipped: list[Skipped] = []
    numbered: dict[int, tuple[str, str]] = {}
    for row in _counted(Path(folder, "entity2id.txt")):
        numbered[int(row[1])] = (row[0], row[2] if len(row) > 2 else row[0])
    entities = [numbered[number] for number in range(len(numbered))]
    names = {identifier: [name] for identifier, name in entities}
    for identifier, name in _rows(Path(folder, synonyms), 2, skipped) if synonyms else ():
        if identifier in names:
            names[identifier].append(name)
    relations = {int(row[1]): row[0] for row in _counted(Path(folder, "relation2id.txt"))}
    triples = np.array([row[:3] for row in _counted(Path(folder, "train2id.txt"))], dtype=np.int64).reshape(-1, 3)
    of_entities = [tuple(dict.fromkeys(names[identifier])) for identifier, _ in entities]
    listed = [relations.get(number, f"relation {number}") for number in range(1 + max(relations, default=-1))]
    return KnowledgeBase([identifier for identifier, _ in entities], of_entities, triples, listed, True, skipped)


def _base(names: dict[str, tuple[str, ...]], links: Iterable[tuple[str, str, str]], skipped: list[Skipped]) -> KnowledgeBase:
    """Triples whose head and tail have names."""
    numbers = {entity: number for number, entity in enumerate(names)}
    relations: dict[str, int] = {}
    triples = [
        (numbers[head], numbers[tail], relations.setdefault(relation, len(relations)))
        for head, tail, relation in links
        if head in numbers and tail in numbers
    ]
    rows = np.array(triples, dtype=np.int64).reshape(-1, 3)
    return KnowledgeBase(list(names), list(names.values()), rows, list(relations), skipped=skipped)


def _rows(path: Path, columns: int, skipped: list[Skipped]) -> Iterator[list[str]]:
    for number, line in enumerate(read_lines(path), 1):
        row = [part.strip() for part in line.split("\t")]
        if len(row) >= columns and all(row[:2]):
            yield row if columns > 2 else row[:2]
        elif line.strip():
            skipped.append(Skipped(-1, f"{path.name}, line {number}", f"bad record: {len(row)} columns"))


def _bars(path: Path, fields: int, skipped: list[Skipped]) -> Iterator[list[str]]:
    """Rows of one of UMLS's files, which may have gigabytes and are not read at once. Raises UserError."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                row = line.rstrip("\n").split("|")
                if len(row) >= fields:
                    yield row
                else:
                    skipped.append(Skipped(-1, f"{path.name}, line {number}", f"bad record: {len(row)} fields"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give the folder META of a release of UMLS.") from error


def _counted(path: Path) -> list[list[str]]:
    """Rows of one of OpenKE's files, whose first line is their number. Raises UserError."""
    lines = [line for line in read_lines(path) if line.strip()]
    rows = [line.split("\t") if "\t" in line else line.split() for line in lines[1:]]
    if not lines or not lines[0].strip().isdigit() or int(lines[0]) != len(rows):
        raise UserError(
            f"{path}: the first line should be the number of the {len(rows)} lines behind it: is the file complete?"
        )
    return rows
