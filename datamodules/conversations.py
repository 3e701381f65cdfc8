"""Conversations about images in LLaVA's files, with the images of their own folder, or simulated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import BaseDataModule
from datamodules.order import BatchRequest
from datamodules.readers.base import BadSample, inside
from datamodules.readers.conversations import PLACEHOLDER, Conversations, Turn, read_conversations
from datamodules.readers.images import open_rgb
from datamodules.rows import RowDataset
from datamodules.tokenizers.chat import ChatTokenizer, EncodedChat, Prompt
from datamodules.transforms.tiles import MEAN, STD, Tiles
from models import batch as keys
from models.batch import IGNORE_INDEX
from models.errors import UserError
from models.io import stable_hash
from models.two_tower.batch import QUERY_PLACES, SIZES, SPANS, TILE_COUNTS, TILES, TOKEN_LABELS, TURNS


class ChatSample(NamedTuple):
    """A conversation as the model reads it: its tokens, the tiles (T, 3, H, W) of its image, and the image's size."""

    chat: EncodedChat
    tiles: Tensor
    size: tuple[int, int]


class ConversationDataset(RowDataset):
    """One split.

    Args:
        samples: the conversations.
        images: folder of their images.
        words: tokenizer.
        tiles: what the model sees of an image.
        training: whether bad samples are replaced.
    """

    def __init__(self, samples: Conversations, images: Path, words: ChatTokenizer, tiles: Tiles, training: bool = False):
        self.samples, self.images, self.words, self.tiles, self.training = samples, images, words, tiles, training

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def fingerprint(self) -> str:
        """Of what the rows say; images are not read for it."""
        return stable_hash([self.samples.fingerprint, self.words.identity])

    def key(self, row: int) -> str:
        return self.samples.key(row)

    def read(self, row: int, rng: np.random.Generator) -> ChatSample:
        conversation = self.samples[row]
        return self.encoded(conversation.turns, self._open(conversation.image) if conversation.image else None)

    def encoded(self, turns: Sequence[Turn], image: Image.Image | None, asked: bool = False) -> ChatSample:
        """A conversation of a user's own; ``asked`` ends it where the model answers. Raises BadSample."""
        encode = self.words.asked if asked else self.words
        if image is None:
            return ChatSample(encode(turns, 0), torch.empty(0, 3, self.tiles.side, self.tiles.side), (0, 0))
        return ChatSample(encode(turns, self.tiles.tokens(image)), self.tiles(image), (image.height, image.width))

    def question(self, row: int) -> ChatSample:
        """A conversation up to its first answer, which is left to the model."""
        conversation = self.samples[row]
        image = self._open(conversation.image) if conversation.image else None
        return self.encoded(conversation.turns, image, asked=True)

    def display(self, row: int) -> NDArray[np.float32]:
        """(1, h, w, 3) in [0, 1]: the whole image as the model sees it; grey for a text alone."""
        name = self.samples[row].image
        if not name:
            return np.full((1, self.tiles.side, self.tiles.side, 3), 0.5, dtype=np.float32)
        return (self.tiles(self._open(name))[:1] * STD + MEAN).clamp(0, 1).permute(0, 2, 3, 1).numpy()

    def collate(self, rows: list[int], samples: list[ChatSample], request: BatchRequest) -> dict[str, Any]:
        return self.batch_of(samples)

    def batch_of(self, samples: Sequence[ChatSample]) -> dict[str, Any]:
        """The batch of these samples, padded on the right to the longest."""
        chats = [sample.chat for sample in samples]
        return {
            keys.TOKEN_IDS: _padded([chat.ids for chat in chats], self.words.padding_id),
            keys.TOKEN_MASK: _padded([np.ones_like(chat.ids) for chat in chats], 0),
            TOKEN_LABELS: _padded([chat.labels for chat in chats], IGNORE_INDEX),
            TURNS: _padded([chat.turns for chat in chats], 0),
            QUERY_PLACES: _padded([chat.query for chat in chats], -1),
            TILES: torch.cat([sample.tiles for sample in samples]),
            TILE_COUNTS: [len(sample.tiles) for sample in samples],
            SIZES: [sample.size for sample in samples],
            SPANS: [chat.span for chat in chats],
        }

    def _open(self, name: str) -> Image.Image:
        return open_rgb(inside(self.images, name))


def _padded(arrays: Sequence[NDArray[np.int64]], value: int) -> Tensor:
    length = max(1, *map(len, arrays))
    return torch.from_numpy(np.stack([np.pad(row, (0, length - len(row)), constant_values=value) for row in arrays]))


class ConversationDataModule(BaseDataModule):
    """``splits`` maps train, val and test to :class:`ConversationDataset`, as far as there are files for them.

    Args:
        root: folder of the images, which the conversations name relative to it.
        train: file of conversations or mix of several, see
            :func:`~datamodules.readers.conversations.read_conversations`; absolute, or relative to ``root``.
        val, test: likewise, or null.
        tokenizer: folder of the language model's tokenizer; null: ``root`` (simulated sets bring their own).
        prompt, max_length, system, label_markers: see :class:`~datamodules.tokenizers.chat.ChatTokenizer`.
        image_size: side of the vision encoder's input, pixels.
        patch_size: side of its patches, pixels.
        grids: see :class:`~datamodules.transforms.tiles.Tiles`; null shows each image as a whole alone.
        batch_size: training samples per device and step.
        eval_batch_size: samples of a batch in validation and test.
        simulate: writes a simulated data set, ``simulate(root) -> folder``.
        val_fraction: share of the training images whose conversations are held out where there is no ``val``.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: no such files, or more unusable conversations or images than allowed.
    """

    preprocessing = ("prompt", "max_length", "system", "image_size", "patch_size", "grids")
    held_out = ("val_fraction",)
    provides = (
        keys.INDEX, keys.TOKEN_IDS, keys.TOKEN_MASK, TOKEN_LABELS, TURNS, QUERY_PLACES, TILES, TILE_COUNTS, SIZES, SPANS,
    )  # fmt: skip

    def __init__(
        self,
        root: str,
        train: str | None,
        val: str | None = None,
        test: str | None = None,
        tokenizer: str | None = None,
        prompt: Prompt = "qwen_1_5",
        max_length: int = 16_384,
        system: str | None = "You are a helpful assistant.",
        label_markers: bool = False,
        image_size: int = 384,
        patch_size: int = 14,
        grids: Sequence[Sequence[int]] | int | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        simulate: Callable[[str], Path] | None = None,
        val_fraction: float = 0.001,
        seed: int = 0,
        num_workers: int | Literal["auto"] = "auto",
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        self.root, self.simulate, self.files = root, simulate, {"train": train, "val": val, "test": test}
        self.tokenizer, self.val_fraction = tokenizer, val_fraction
        self.chat: dict[str, Any] = {
            "prompt": prompt, "max_length": max_length, "system": system, "label_markers": label_markers,
        }  # fmt: skip
        self.image_size, self.patch_size, self.grids = image_size, patch_size, grids
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.words: ChatTokenizer

    def holds_data(self, root: Path) -> bool:
        return any((root / file).is_file() for file in self.files.values() if file)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        root = self.folder()
        self.words = ChatTokenizer(self.tokenizer or str(root), **self.chat)
        samples = {split: read_conversations(root / file, self.seed) for split, file in self.files.items() if file}
        if "train" in samples and "val" not in samples and self.val_fraction:
            samples["train"], samples["val"] = samples["train"].split(self.val_fraction)
        tiles = Tiles(self.image_size, self.patch_size, self.grids)
        for split, of_split in samples.items():
            if len(of_split):
                self.splits[split] = ConversationDataset(of_split, root, self.words, tiles, training=split == "train")
        if not self.splits:
            raise UserError("there is not one conversation: give a file of them, datamodule.train=<file>.")

    def facts(self) -> dict[str, Any]:
        """How many token ids there are, and how images are shown."""
        return {
            "vocab_size": len(self.words), "image_size": self.image_size, "patch_size": self.patch_size, "grids": self.grids,
        }  # fmt: skip

    def train_dataloader(self) -> DataLoader:
        if "train" not in self.splits:
            raise UserError("there are no conversations to train on: give a file of them, datamodule.train=<file>.")
        return self.train_loader(self.splits["train"], self.batch_size)

    def evaluation_dataloader(self, split: str) -> DataLoader:
        return self.evaluation_loader(self.splits[split], self.eval_batch_size)

    def asked(self, image: Image.Image, question: str) -> dict[str, Any]:
        """The batch of one question of a user's own about an image, whose answer is left to the model. Raises BadSample."""
        dataset: ConversationDataset = next(iter(self.splits.values()))
        return dataset.batch_of([dataset.encoded([Turn("user", f"{PLACEHOLDER}\n{question}")], image, asked=True)])


def check_copy(file: str, root: str) -> list[str]:
    """What is wrong with a file of conversations and its images, a line each; empty when all can be used.

    Args:
        file: see :func:`~datamodules.readers.conversations.read_conversations`.
        root: folder of the images.
    """
    try:
        samples = read_conversations(file)
    except UserError as error:
        return [str(error)]
    problems: dict[str, dict[str, None]] = {}  # kind of problem -> entries or images
    for row in range(len(samples)):
        try:
            name = samples[row].image
            if name and not inside(root, name).is_file():
                problems.setdefault("missing image", {})[name] = None
        except BadSample as error:
            problems.setdefault(str(error).split(":")[0], {})[samples.key(row)] = None
    return [
        f"{len(named)} of {len(samples)} entries: {kind}, the first is {next(iter(named))}" for kind, named in problems.items()
    ]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m datamodules.conversations FILE ROOT, for example blip_laion_cc_sbu_558k.json images")
    problems = check_copy(*sys.argv[1:])
    print("\n".join(problems) or "every entry can be used, and every image is there")
    sys.exit(bool(problems))
