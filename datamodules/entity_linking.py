"""Which entities a text names: the longest names of a vocabulary that stand in it, from left to right."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from datamodules.abbreviations import abbreviations
from datamodules.readers.image_annotations.sample import Span
from datamodules.readers.text import read_names
from models.io import atomic_write, exclusive, read_tensors, stable_hash

STOP = (
    "a", "about", "all", "an", "and", "are", "as", "at", "be", "both", "but", "by", "can", "did", "do", "does", "for", "from",
    "had", "has", "have", "he", "her", "his", "how", "if", "in", "is", "it", "its", "may", "more", "most", "no", "not", "of",
    "on", "or", "other", "out", "she", "so", "some", "than", "that", "the", "their", "then", "there", "these", "they", "this",
    "to", "was", "we", "were", "what", "when", "where", "which", "who", "why", "will", "with", "you",
)  # fmt: skip
_WORD = re.compile(r"[^\W_]+|[.,;:!?()]")  # a mark between words: no name reaches over it
_SIBILANT = ("ses", "xes", "zes", "ches", "shes")


class _Forms(dict):
    """Word -> the form in which it is compared, computed once."""

    def __missing__(self, word: str) -> str:
        self[word] = form = singular(word.lower())
        return form


class EntityLinker:
    """``text -> spans`` of a vocabulary. Words are compared without case and in the singular; hyphens and slashes part words.

    A name of one word in capitals, of at most ``acronym`` letters, is an acronym and is found in capitals alone. Names of one
    character are not linked. A name of several entities stands for the first one that has it.

    Args:
        names: of each entity, synonyms included.
        stop: names that are not linked, beside the words of :data:`STOP`.
        stop_file: text file of further ones, one a line.
        acronym: letters of the longest acronym.
        abbreviations: a short form that a text defines beside the name of an entity stands for that entity in all of the text.
    """

    def __init__(
        self,
        names: Iterable[Sequence[str]],
        stop: Sequence[str] = (),
        stop_file: str | None = None,
        acronym: int = 5,
        abbreviations: bool = False,
    ):
        self.abbreviations = abbreviations
        self._forms = _Forms()
        self._found: dict[str, list[tuple[int, str | None]]] = {}  # words of a name -> entity, surface of an acronym
        self._longest: dict[str, int] = {}  # first word -> words of the longest name that begins with it
        self.ambiguous = 0  # names that another entity had before
        stopped = {self._key(name) for name in (*STOP, *stop, *(read_names(stop_file) if stop_file else ()))}
        for entity, of_entity in enumerate(names):
            for name in of_entity:
                self._add(entity, name.strip(), stopped, acronym)
        self.identity = stable_hash([sorted(self._found.items()), acronym, *(["abbreviations"] if abbreviations else [])])

    def __len__(self) -> int:
        return len(self._found)

    def __call__(self, text: str) -> list[Span]:
        """First character, the one behind the last, and number of each entity, in the order of the text."""
        words = [match.span() for match in _WORD.finditer(text)]
        forms = [self._forms[text[start:end]] for start, end in words]
        spans, place, longest, found = [], 0, self._longest, self._found
        while place < len(forms):
            most = longest.get(forms[place], 0)
            for count in range(min(most, len(forms) - place), 0, -1):
                candidates = found.get(" ".join(forms[place : place + count]))
                if candidates:
                    start, end = words[place][0], words[place + count - 1][1]
                    entity = next((e for e, exact in candidates if exact is None or exact == text[start:end]), None)
                    if entity is not None:
                        spans.append((start, end, entity))
                        place += count - 1
                        break
            place += 1
        return self._resolved(text, spans) if self.abbreviations and "(" in text else spans

    def _resolved(self, text: str, spans: list[Span]) -> list[Span]:
        """With the short forms that a text defines; one within a longer name stays a part of it."""
        for short, long in abbreviations(text).items():
            candidates = self._found.get(self._key(long), ())
            entity = next((entity for entity, exact in candidates if exact is None or exact == long), None)
            if entity is None:
                continue
            for start, end in _places(short, text):
                if all(last <= start or end <= first or (first, last) == (start, end) for first, last, _ in spans):
                    spans = [span for span in spans if span[:2] != (start, end)] + [(start, end, entity)]
        return sorted(spans)

    def _key(self, name: str) -> str:
        return " ".join(self._forms[word] for word in _WORD.findall(name))

    def _add(self, entity: int, name: str, stopped: set[str], acronym: int) -> None:
        key = self._key(name)
        exact = name if name.isupper() and name.isalpha() and len(name) <= acronym else None
        if len(name) < 2 or not key or (key in stopped and exact is None):
            return
        known = self._found.setdefault(key, [])
        if any(other_exact == exact for _, other_exact in known):
            self.ambiguous += all(other != entity for other, _ in known)
            return
        known.append((entity, exact))
        known.sort(key=lambda pair: pair[1] is None)  # an acronym in capitals goes before the word
        words = key.split(" ")
        self._longest[words[0]] = max(self._longest.get(words[0], 0), len(words))


def _places(word: str, text: str) -> Iterator[tuple[int, int]]:
    """Where ``word`` stands by itself in a text."""
    start = text.find(word)
    while start >= 0:
        end = start + len(word)
        if not text[start - 1 : start].isalnum() and not text[end : end + 1].isalnum():
            yield start, end
        start = text.find(word, end)


def words_of(text: str) -> list[tuple[str, int]]:
    """The words of a text in lower case, and the character that each begins with."""
    return [(match[0].lower(), match.start()) for match in _WORD.finditer(text) if match[0].isalnum()]


def singular(word: str) -> str:
    """``word`` (lower case) without the ending of a regular English plural."""
    if len(word) < 4 or not word.endswith("s") or word.endswith(("ss", "us", "is")):
        return word
    if word.endswith("ies"):
        return word[:-3] + "y"
    return word[:-2] if word.endswith(_SIBILANT) else word[:-1]


class Links(Mapping[str, list[Span]]):
    """The spans of texts in two arrays.

    Args:
        texts: the N texts, without repetition.
        ends: (N,) number of spans up to and with those of each text.
        spans: (n, 3) int32 of all texts in their order.
    """

    def __init__(self, texts: Sequence[str], ends: np.ndarray, spans: np.ndarray):
        self._rows = {text: row for row, text in enumerate(texts)}
        self._ends, self._spans = ends, spans

    @classmethod
    def of(cls, spans: Mapping[str, Sequence[Span]]) -> Links:
        """Of texts and their spans."""
        ends = np.cumsum([len(of_text) for of_text in spans.values()], dtype=np.int64)
        listed = [span for of_text in spans.values() for span in of_text]
        return cls(list(spans), ends, np.array(listed, dtype=np.int32).reshape(-1, 3))

    def __getitem__(self, text: str) -> list[Span]:
        row = self._rows[text]
        first = int(self._ends[row - 1]) if row else 0
        return [tuple(span) for span in self._spans[first : self._ends[row]].tolist()]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self):
        return iter(self._rows)

    def counts(self, entities: int) -> np.ndarray:
        """(``entities``,) how often each is linked."""
        return np.bincount(self._spans[:, 2], minlength=entities)

    def renumbered(self, numbers: np.ndarray) -> Links:
        """With ``numbers`` (E,) in place of the entities' own; those with -1 are left out."""
        new = numbers[self._spans[:, 2]]
        left = np.concatenate([[0], np.cumsum(new >= 0)])
        spans = np.column_stack([self._spans[:, :2], new])[new >= 0].astype(np.int32)
        return Links(list(self._rows), left[self._ends], spans)


def linked(texts: Iterable[str], linker: EntityLinker, cache: str) -> Links:
    """The entities of all ``texts``, linked once and kept in the folder ``cache`` for every later run."""
    distinct = list(dict.fromkeys(texts))
    file = Path(cache, f"links_{stable_hash([linker.identity, stable_hash(distinct)])}.safetensors")
    with exclusive(file):
        if not file.is_file():
            links = Links.of({text: linker(text) for text in distinct})
            arrays = {"ends": torch.from_numpy(links._ends), "spans": torch.from_numpy(links._spans)}
            with atomic_write(file) as temporary:
                save_file(arrays, temporary)
    arrays = read_tensors(file)
    return Links(distinct, arrays["ends"].numpy(), arrays["spans"].numpy())
