"""Stage ``link``: which entities of the knowledge base the texts name, and what they name besides."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table

from datamodules.entity_linking import STOP, words_of
from datamodules.medical import texts_of
from datamodules.readers.image_annotations.sample import Span
from datamodules.vision_language_rows import VisionLanguageDataset
from experiments.run import parts
from experiments.run.directory import Run
from experiments.run.screen import console
from experiments.stages import Facts, stage
from models.io import atomic_write

log = logging.getLogger("run")
MOST = 1000  # words without an entity that are listed
SHOWN = 10  # of either list, on screen


@stage(repeat=True)
def link(run: Run) -> Facts:
    """Write ``links.jsonl``, a line per text with its entities, and ``unlinked.tsv``, the commonest words outside of them.

    Links and vectors are computed here where they are not in the cache yet, so that a long training need not begin with it.
    """
    data = parts.datamodule(run)
    linked = data.linked
    names, links = linked.graph.names, linked.links
    entities: Counter[int] = Counter()
    words: Counter[str] = Counter()
    texts = named = 0
    with atomic_write(run.dir / "links.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as file:
        for split, text in _texts(data.splits):
            spans = links[text]
            named_entities = [{"text": text[a:b], "id": linked.identifiers[n], "name": names[n]} for a, b, n in spans]
            file.write(json.dumps({"split": split, "text": text, "entities": named_entities}, ensure_ascii=False) + "\n")
            entities.update(entity for _, _, entity in spans)
            words.update(_uncovered(text, spans))
            texts, named = texts + 1, named + bool(spans)
    with atomic_write(run.dir / "unlinked.tsv") as temporary:
        temporary.write_text("".join(f"{word}\t{count}\n" for word, count in words.most_common(MOST)), encoding="utf-8")
    report = {
        **linked.report, "texts": texts, "texts_with_an_entity": named, "entities_per_text": sum(entities.values()) / texts,
        "entities_named": len(entities),
    }  # fmt: skip
    table = Table("linked", "times", "not linked", "times")
    common = [(names[entity], count) for entity, count in entities.most_common(SHOWN)]
    for row in range(SHOWN):
        cells = [pair for counts in (common, words.most_common(SHOWN)) for pair in counts[row : row + 1] or [("", "")]]
        table.add_row(*(str(cell) for pair in cells for cell in pair))
    console().print(table)
    log.info("link: %d of %d texts name an entity; links.jsonl and unlinked.tsv are in %s", named, texts, run.dir)
    return {"result": {"links": report}}


def _texts(splits: Mapping[str, VisionLanguageDataset]) -> Iterator[tuple[str, str]]:
    """Every text of every split once."""
    for split, dataset in splits.items():
        for text in dict.fromkeys(text for sample in dataset.samples for text in texts_of(sample)):
            yield split, text


def _uncovered(text: str, spans: Sequence[Span]) -> Iterator[str]:
    """Words that count, in lower case, outside all spans."""
    for word, start in words_of(text):
        if word not in STOP and len(word) > 1 and not any(first <= start < last for first, last, _ in spans):
            yield word
