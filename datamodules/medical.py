"""Medical images with captions and questions whose entities are linked to a knowledge graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.knowledge import Knowledge, Linked
from datamodules.order import BatchRequest
from datamodules.readers.image_annotations.sample import ImageAnnotations, ImageSample
from datamodules.tokenizers.mlm import mask_words
from datamodules.vision_language import VisionLanguageDataModule
from datamodules.vision_language_rows import QUESTIONS, VisionLanguageDataset
from models import batch as keys
from models.arl.batch import IMAGE_ENTITIES, TEXT_ENTITIES, entity_keys
from models.arl.entities import Entity, Placed, continuations, place_entities, token_spans
from models.arl.graph import NO_ENTITY
from models.io import stable_hash
from models.two_tower.batch import TEXTS

KEPT_TEXTS = 20_000  # whose tokens are in memory


class LinkedDataset(VisionLanguageDataset):
    """Rows whose texts carry the entities that they name.

    Args:
        rows, words, options: see :class:`VisionLanguageDataset`.
        linked: entities of all texts.
        max_entities: of a text; those behind are predicted by ``align``, but no stream of the model.
        mask_entities: masked language modelling masks whole entities, and hides them among the text's; False: single tokens,
            and all of the text's entities stay (without the third use of knowledge).
        count_padding: padding counts in the budget of masked tokens (official: a short text is masked almost as a whole).
    """

    def __init__(
        self,
        rows: ImageAnnotations,
        linked: Linked,
        max_entities: int,
        mask_entities: bool,
        count_padding: bool,
        *arguments: Any,
        **options: Any,
    ):
        super().__init__(rows, *arguments, **options)
        self.linked, self.max_entities = linked, max_entities
        self.mask_entities, self.count_padding = mask_entities, count_padding
        self._known: dict[str, tuple[Tensor, Tensor, list[Entity]]] = {}
        self._of_image: dict[int, set[int]] = {}
        for sample in self.samples if "align" in self.tasks else ():
            named = self._of_image.setdefault(sample.medium, set())
            named.update(span[2] for text in sample.captions for span in linked.links[text])

    def texts(self, name: str, texts: Sequence[str]) -> dict[str, Tensor]:
        """As in the base, and the entities of each text with the tokens that they cover."""
        ids, mask, entities = self._tokens(texts)
        batch = dict(zip(TEXTS[name], (ids, mask), strict=True))
        # Texts of several batches are joined, where those of one image are listed.
        most = self.max_entities if name == "all_captions" else max(map(len, entities), default=0)
        placed = [place_entities(of_text, self.words.length, max(min(most, self.max_entities), 1)) for of_text in entities]
        return batch | _stacked(name, placed)

    def _captions(self, request: BatchRequest, rows: list[int], captions: Sequence[str]) -> dict[str, Tensor]:
        batch = super()._captions(request, rows, captions)
        if "align" in self.tasks:
            of_texts = [sorted({entity[2] for entity in of_text}) for of_text in self._tokens(captions)[2]]
            batch[TEXT_ENTITIES] = _padded(of_texts)
            batch[IMAGE_ENTITIES] = _padded([sorted(self._of_image[self.samples[row].medium]) for row in rows])
        return batch

    def masked(self, captions: Sequence[str], ids: NDArray[np.int64], rngs: Sequence[np.random.Generator]) -> dict[str, Tensor]:
        """Captions with whole entities masked, which are then no entities of the text (ARL's *learn*)."""
        entities = self._tokens(captions)[2]
        if not self.mask_entities:
            placed = [place_entities(of_text, ids.shape[1], self.max_entities) for of_text in entities]
            return super().masked(captions, ids, rngs) | _stacked("masked", placed)
        drawn, placed = [], []
        for of_text, named, rng in zip(ids, entities, rngs, strict=True):
            together = continuations(named, len(of_text))
            drawn.append(mask_words(of_text, self.words, rng, continues=together, count_padding=self.count_padding))
            placed.append(place_entities(named, len(of_text), self.max_entities, drawn[-1][1]))
        masked, labels = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
        return {keys.MASKED_IDS: masked, keys.MASKED_LABELS: labels, **_stacked("masked", placed)}

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor, list[list[Entity]]]:
        """Ids and mask (n, L) and the entities of texts by tokens; a text is cut into tokens once for all that a batch needs of
        it. A text that is in no split is linked now."""
        if len(self._known) > KEPT_TEXTS:
            self._known.clear()
        if new := [text for text in dict.fromkeys(texts) if text not in self._known]:
            links = self.linked.links
            for text, ids, mask, offsets in zip(new, *self.words.with_offsets(new), strict=True):
                spans = links[text] if text in links else self.linked.link(text)
                self._known[text] = ids, mask, token_spans(spans, offsets)
        ids, mask, entities = zip(*(self._known[text] for text in texts), strict=True)
        return torch.stack(ids), torch.stack(mask), list(entities)


class MedicalDataModule(VisionLanguageDataModule):
    """``splits`` maps train, val and test to :class:`LinkedDataset`.

    Args:
        root, annotations, tasks, train_transform, transform, options: see :class:`VisionLanguageDataModule`.
        knowledge: the knowledge base and how texts are linked to it.
        max_entities, mask_entities, count_padding: see :class:`LinkedDataset`.

    Raises:
        UserError: see :class:`VisionLanguageDataModule` and :class:`~datamodules.knowledge.Knowledge`.
    """

    def __init__(
        self,
        knowledge: Knowledge,
        max_entities: int = 24,
        mask_entities: bool = True,
        count_padding: bool = False,
        **options: Any,
    ):
        super().__init__(**options)
        self.knowledge, self.max_entities = knowledge, max_entities
        self.mask_entities, self.count_padding = mask_entities, count_padding
        self.linked: Linked

    def prepare_splits(self, root: str, splits: Mapping[str, ImageAnnotations]) -> None:
        """Link all texts and take over the graph."""
        texts = {split: [text for sample in rows.samples for text in texts_of(sample)] for split, rows in splits.items()}
        links_of_splits = [rows.links for rows in splits.values() if rows.links is not None]
        links = {text: spans for of_split in links_of_splits for text, spans in of_split.items()} if links_of_splits else None
        self.linked = self.knowledge.of(Path(root), texts, links)

    def dataset(self, rows: ImageAnnotations, training: bool) -> LinkedDataset:
        transform = self.train_transform if training else self.transform
        settings = (self.linked, self.max_entities, self.mask_entities, self.count_padding)
        return LinkedDataset(rows, *settings, self.words, transform, training=training, **self.common)

    @property
    def provides(self) -> tuple[str, ...]:
        return (*super().provides, *entity_keys_of(self.common["tasks"]))

    @property
    def hashes(self) -> dict[str, str]:
        """Of the knowledge graph: its entities, in the order of their vectors, and triples."""
        return {"knowledge_graph": stable_hash([self.linked.identifiers, self.linked.graph.triples.tolist()])}

    def facts(self) -> dict[str, Any]:
        """As in the base, and the knowledge graph."""
        return {**super().facts(), "graph": self.linked.graph}


def texts_of(sample: ImageSample) -> tuple[str, ...]:
    """Captions and question."""
    return (*sample.captions, *([sample.question] if sample.question else []))


def entity_keys_of(tasks: Sequence[str]) -> tuple[str, ...]:
    """Keys of a batch of :class:`LinkedDataset` beside those of its base."""
    names = ["question"] if set(tasks) & set(QUESTIONS) else []
    names += ["caption"] if set(tasks) - set(QUESTIONS) else []
    names += [{"mlm": "masked", "rank": "candidates"}[task] for task in tasks if task in ("mlm", "rank")]
    of_align = (TEXT_ENTITIES, IMAGE_ENTITIES) if "align" in tasks else ()
    return (*(key for name in names for key in entity_keys(name)), *of_align)


def _stacked(name: str, placed: Sequence[Placed]) -> dict[str, Tensor]:
    arrays = (np.stack(part) for part in zip(*placed, strict=True))
    return {key: torch.from_numpy(array) for key, array in zip(entity_keys(name), arrays, strict=True)}


def _padded(lists: Sequence[Sequence[int]]) -> Tensor:
    """(B, n), NO_ENTITY behind the last one of each."""
    most = max(1, max(map(len, lists)))
    return torch.tensor([[*of_row, *[NO_ENTITY] * (most - len(of_row))] for of_row in lists])
