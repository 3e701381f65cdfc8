"""The knowledge of a data set of texts: which entities they name, the graph of these, and entity vectors to start with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from datamodules.entity_linking import EntityLinker, Links, linked
from datamodules.readers.image_annotations.sample import Span
from datamodules.readers.knowledge import KnowledgeBase
from models.arl.graph import Graph
from models.errors import UserError
from models.io import atomic_write, exclusive, read_tensors, stable_hash


class Linked(NamedTuple):
    """The entities of all texts by text, numbered as in ``graph``; ``identifiers`` of the entities; ``link``: of further texts;
    ``report``: numbers for the reader."""

    links: Mapping[str, Sequence[Span]]
    graph: Graph
    identifiers: list[str]
    link: Callable[[str], list[Span]]
    report: dict[str, int]


class Knowledge:
    """Settings of the knowledge side, and the way from texts to a graph.

    Args:
        read: ``(folder) -> KnowledgeBase``, one of :mod:`datamodules.readers.knowledge`.
        folder: of the knowledge base's files; null: ``knowledge`` in the folder of the data.
        linker: ``(names) -> EntityLinker``.
        vectors: ``(triples, entities, relations) -> (E, K)``, the initial entity vectors; null: random ones.
        min_count: an entity enters the graph when more texts than this name it, once for each time (officially 20).
        count: splits whose texts are counted: ``train``, or ``all`` (official).
        cache: folder for links and vectors, which are computed once.
    """

    def __init__(
        self,
        read: Callable[[str], KnowledgeBase],
        cache: str,
        folder: str | None = None,
        linker: Callable[..., EntityLinker] = EntityLinker,
        vectors: Callable[..., Tensor] | None = None,
        min_count: int = 20,
        count: Literal["train", "all"] = "train",
    ):
        self.read, self.cache, self.folder, self.linker = read, cache, folder, linker
        self.vectors, self.min_count, self.count = vectors, min_count, count

    def of(self, root: Path, texts: Mapping[str, Sequence[str]], links: Mapping[str, Sequence[Span]] | None) -> Linked:
        """The knowledge of a data set.

        Args:
            root: its folder.
            texts: of each split.
            links: of all texts, where the data set has them; numbers are those of a knowledge base that is ``numbered``.

        Raises:
            UserError: no file, numbers of another knowledge base, or no entity in any text.
        """
        base = self.read(str(self.folder or root / "knowledge"))
        linker = self.linker(base.names)
        every = [text for of_split in texts.values() for text in of_split]
        if links is not None:
            if not base.numbered:
                raise UserError(
                    "knowledge: this data holds linked entities by number. Give the files that it was made with: "
                    "knowledge=openke knowledge.folder=<data/knowledge>."
                )
            largest = max((span[2] for spans in links.values() for span in spans), default=-1)
            if largest >= len(base.entities):
                raise UserError(
                    f"knowledge: the data names entity {largest}, and there are {len(base.entities)}: knowledge.folder "
                    "belongs to other data."
                )
        else:
            links = linked(every, linker, self.cache)
        numbers = np.arange(len(base.entities))
        triples = base.triples
        if not base.numbered:
            assert isinstance(links, Links)
            counted = every if self.count == "all" else texts["train"]
            numbers, triples = restricted(base, _counts(links, counted, len(base.entities)), self.min_count)
            links = links.renumbered(numbers)
        order = np.argsort(numbers)[(numbers < 0).sum() :]
        if not len(order):
            raise UserError(
                f"knowledge: no entity is named more than knowledge.min_count={self.min_count} times in texts and stands in a "
                "triple with another: look at what is linked (stages=[prepare,link]), or lower knowledge.min_count."
            )
        names = [base.names[row][0] for row in order]
        graph = Graph(names, torch.from_numpy(triples[:, :2].copy()), self._vectors(triples, len(order), len(base.relations)))

        def link(text: str) -> list[Span]:
            return [(start, end, int(numbers[entity])) for start, end, entity in linker(text) if numbers[entity] >= 0]

        report = {
            "names": len(linker), "ambiguous_names": linker.ambiguous, "entities_known": len(base.entities),
            "entities": len(order), "triples": len(triples), "skipped_lines": len(base.skipped),
        }  # fmt: skip
        return Linked(links, graph, [base.entities[row] for row in order], link, report)

    def _vectors(self, triples: np.ndarray, entities: int, relations: int) -> Tensor | None:
        """From the cache, or computed."""
        if self.vectors is None:
            return None
        name = [described(self.vectors), triples.tolist(), entities, relations]
        file = Path(self.cache, f"vectors_{stable_hash(name)}.safetensors")
        with exclusive(file):
            if not file.is_file():
                vectors = self.vectors(torch.from_numpy(triples), entities, relations)
                with atomic_write(file) as temporary:
                    save_file({"vectors": vectors.contiguous()}, temporary)
        return read_tensors(file)["vectors"]


def restricted(base: KnowledgeBase, counts: np.ndarray, min_count: int) -> tuple[np.ndarray, np.ndarray]:
    """Entities and triples of the graph, as the official code chooses and numbers them.

    Entities that are counted more than ``min_count`` times and stand in a triple with another such entity, by descending number
    of their triples, then identifier.

    Returns:
        (E,) the new number of each entity, -1 of those that are left out; (T, 3) triples with new numbers.
    """
    frequent = counts > min_count
    triples = base.triples[frequent[base.triples[:, 0]] & frequent[base.triples[:, 1]]]
    degrees = np.bincount(triples[:, :2].ravel(), minlength=len(base.entities))
    order = sorted(np.flatnonzero(degrees).tolist(), key=lambda row: (degrees[row], base.entities[row]), reverse=True)
    numbers = np.full(len(base.entities), -1)
    numbers[order] = np.arange(len(order))
    return numbers, np.column_stack([numbers[triples[:, :2]], triples[:, 2]])


def _counts(links: Links, texts: Sequence[str], entities: int) -> np.ndarray:
    counts = np.zeros(entities, dtype=np.int64)
    for text in texts:
        for _, _, entity in links[text]:
            counts[entity] += 1
    return counts


def described(function: Any) -> str:
    """A factory with its arguments, to tell two apart."""
    partial_of = getattr(function, "func", function)
    return f"{partial_of.__module__}.{partial_of.__qualname__} {sorted(getattr(function, 'keywords', {}).items())}"
