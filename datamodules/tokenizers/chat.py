"""Conversations to token ids and labels: LLaVA's prompts ``plain`` and ``qwen_1_5`` (ChatML)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from datamodules.readers.base import BadSample
from datamodules.readers.conversations import PLACEHOLDER, Turn
from models.batch import IGNORE_INDEX
from models.encoders.weights import find_weights
from models.errors import UserError
from models.io import stable_hash

Prompt = Literal["plain", "qwen_1_5"]
START, END = "<|im_start|>", "<|im_end|>"


class EncodedChat(NamedTuple):
    """A conversation of S tokens.

    Attributes:
        ids: (S,) int64, padding at visual places.
        labels: (S,) int64, IGNORE_INDEX where nothing is predicted.
        turns: (S,) int64: the number, from 1, of the answer that a token is of; 0 elsewhere, and in an answer that is cut.
        span: the first visual token and their number.
        query: places of the first question's own tokens.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    turns: NDArray[np.int64]
    span: tuple[int, int]
    query: NDArray[np.int64]


class ChatTokenizer:
    """Conversations to :class:`EncodedChat`.

    Args:
        folder: of a tokenizer of transformers (``tokenizer.json``), such as Qwen2's; a path or ``package://...``.
        prompt: ``qwen_1_5``: ChatML, the answers are predicted with their end; ``plain``: the image, then the caption with the
            end of its line, which are predicted.
        max_length: tokens of a conversation, visual ones included; longer ones are cut on the right.
        system: what ChatML begins with; None: nothing.
        label_markers: of ``qwen_1_5``: also predict the marks of all turns, all ends of lines, and the head of each answer, as
            the official code does.

    Attributes:
        identity: hash of all that decides on the ids.
        end_id: token behind an answer.
        padding_id: token at padding and visual places.
    """

    def __init__(
        self,
        folder: str,
        prompt: Prompt = "qwen_1_5",
        max_length: int = 16_384,
        system: str | None = "You are a helpful assistant.",
        label_markers: bool = False,
    ):
        path = find_weights("the tokenizer", None, folder, "datamodule.tokenizer")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the tokenizers' own exceptions have no common base
            raise UserError(f"datamodule.tokenizer: {path} holds no tokenizer of transformers ({str(error)[:200]}).") from error
        self.prompt, self.max_length, self.system, self.label_markers = prompt, max_length, system, label_markers
        known = self.tokenizer.get_vocab()
        if prompt == "qwen_1_5" and not {START, END} <= known.keys():
            raise UserError(f"datamodule.tokenizer: {path} lacks {START} or {END}, which datamodule.prompt=qwen_1_5 needs.")
        self.newline = self._ids("\n")
        self.start_id: int = known.get(START, 0)
        self.end_id: int = known[END] if prompt == "qwen_1_5" else self.newline[-1]
        self.heads = {role: [self.start_id, *self._ids(f"{role}\n")] for role in ("system", "user", "assistant")}
        padding = self.tokenizer.pad_token_id
        self.padding_id = padding if padding is not None else (self.tokenizer.eos_token_id or 0)
        some_ids = self._ids("What is shown?")
        self.identity = stable_hash([len(self.tokenizer), some_ids, prompt, max_length, system, label_markers])

    def __len__(self) -> int:
        return len(self.tokenizer)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of new tokens, up to the end of the answer."""
        ids = list(ids)
        return self.tokenizer.decode(ids[: ids.index(self.end_id)] if self.end_id in ids else ids, skip_special_tokens=True)

    def __call__(self, turns: Sequence[Turn], visual: int) -> EncodedChat:
        """Tokens and labels of a conversation.

        Args:
            turns: what is said.
            visual: visual tokens in the place of the image.

        Raises:
            BadSample: no answer within ``max_length``, or a conversation that the prompt does not take.
        """
        encoded = self._plain(turns, visual) if self.prompt == "plain" else self._chat(turns, visual)
        if not (encoded.labels != IGNORE_INDEX).any() or not (encoded.labels[1:] != IGNORE_INDEX).any():
            raise BadSample(f"no answer: nothing to predict within {self.max_length} tokens, of which {visual} are visual")
        return encoded

    def asked(self, turns: Sequence[Turn], visual: int) -> EncodedChat:
        """The turns up to the first answer, which is left to the model: for generation."""
        until = next((number for number, turn in enumerate(turns) if turn.role == "assistant"), len(turns))
        if self.prompt == "plain":
            return _Writer(self).add([], visual=visual).encoded()
        writer = self._written(turns[:until], visual)
        return writer.add(self.heads["assistant"]).encoded()

    def _plain(self, turns: Sequence[Turn], visual: int) -> EncodedChat:
        if not visual or [turn.role for turn in turns] != ["user", "assistant"]:
            raise BadSample("bad record: the prompt plain takes an image and its caption")
        return _Writer(self).add([], visual=visual).add(self._ids(turns[1].text + "\n"), labelled=True, turn=1).encoded()

    def _chat(self, turns: Sequence[Turn], visual: int) -> EncodedChat:
        encoded = self._written(turns, visual).encoded()
        if self.label_markers:
            marks = np.isin(encoded.ids, [self.start_id, self.end_id, *(self.newline if len(self.newline) == 1 else [])])
            marks[encoded.span[0] : sum(encoded.span)] = False
            encoded = encoded._replace(labels=np.where(marks, encoded.ids, encoded.labels))
        return encoded

    def _written(self, turns: Sequence[Turn], visual: int) -> _Writer:
        writer, answers, asked = _Writer(self), 0, False
        if self.system is not None and (not turns or turns[0].role != "system"):
            turns = [Turn("system", self.system), *turns]
        for role, text in turns:
            answers += role == "assistant"
            answer = answers if role == "assistant" else 0
            head = bool(answer) and self.label_markers
            writer.add(self.heads[role], labelled=head)
            before, placeholder, behind = text.partition(PLACEHOLDER)
            query = role == "user" and not asked
            asked |= role == "user"
            writer.add(self._ids(before), labelled=bool(answer), turn=answer, query=query)
            if placeholder:
                writer.add([], visual=visual)
                line = "\n" if behind.startswith("\n") else ""
                writer.add(self._ids(line)).add(self._ids(behind.removeprefix(line)), query=query)
            writer.add([self.end_id], labelled=bool(answer), turn=answer).add(self.newline, labelled=head)
        return writer

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False) if text else []


class _Writer:
    """Collects pieces of a sequence."""

    def __init__(self, words: ChatTokenizer):
        self.words, self.span, self.length = words, (0, 0), 0
        self.pieces: list[tuple[list[int], bool, int, bool]] = []  # ids, labelled, turn, query

    def add(self, ids: list[int], labelled: bool = False, turn: int = 0, query: bool = False, visual: int = 0) -> _Writer:
        if visual:
            self.span, ids = (self.length, visual), [self.words.padding_id] * visual
        self.pieces.append((ids, labelled, turn, query))
        self.length += len(ids)
        return self

    def encoded(self) -> EncodedChat:
        """What fits into the length. An answer whose end is cut off is of no turn."""
        counts = [len(ids) for ids, *_ in self.pieces]
        ids = np.array([number for piece, *_ in self.pieces for number in piece], dtype=np.int64)
        labelled, turns, query = (np.repeat([piece[i] for piece in self.pieces], counts) for i in (1, 2, 3))
        length = self.words.max_length
        cut = np.unique(turns[length:])
        first, visual = self.span
        return EncodedChat(
            ids[:length],
            np.where(labelled, ids, IGNORE_INDEX)[:length],
            np.where(np.isin(turns, cut), 0, turns)[:length].astype(np.int64),
            (min(first, length), max(min(visual, length - first), 0)),
            np.flatnonzero(query[:length]),
        )
