"""DGM4: manipulated and pristine image-text pairs with boxes and word positions, in the official files.

``python -m datamodules.dgm4 ROOT`` says what is missing or unusable in a copy.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.base import BaseDataModule
from datamodules.order import BatchRequest
from datamodules.readers.base import BadSample, inside
from datamodules.readers.images import LFS_POINTER, open_rgb
from datamodules.readers.text import read_json
from datamodules.rows import RowDataset
from datamodules.tokenizers.word_labels import CaptionTokenizer
from datamodules.transforms.augment import RandomAugment
from datamodules.transforms.image_box import box_target, image_tensor
from models.batch import IMAGE, INDEX, TOKEN_IDS, TOKEN_MASK, Skipped
from models.errors import UserError
from models.hammer.batch import BOX, FAKE, MANIPULATIONS, MULTI_LABEL, TOKEN_LABELS
from models.io import stable_hash

SPLITS = ("train", "val", "test")
FIELDS = ("image", "text", "fake_image_box", "fake_text_pos", "fake_cls")
LARGEST = 2**31  # of a coordinate or word number
LAYOUT = """  <root>/DGM4/metadata/{train,val,test}.json
  <root>/DGM4/manipulation/{infoswap,simswap,StyleCLIP,HFGI}/*.jpg
  <root>/DGM4/origin/{guardian,usa_today,washington_post,bbc}/*/*.jpg"""


class Record(NamedTuple):
    """One entry of a metadata file, see :func:`read_record`.

    Attributes:
        image: path below the root.
        text: caption.
        box: (x1, y1, x2, y2) in pixels of the stored image, or empty.
        words: positions of manipulated words, counted between white space.
        fake_cls: ``orig``, or kinds of manipulation joined by ``&``.
        kinds: (4,) 0 and 1 by the order of MANIPULATIONS.
    """

    image: str
    text: str
    box: list[float]
    words: list[int]
    fake_cls: str
    kinds: list[int]


def read_record(entry: Any) -> Record:
    """Check one entry of a metadata file. Raises BadSample that names the field."""
    if not isinstance(entry, dict):
        raise BadSample(f"bad record: {type(entry).__name__} instead of an object")
    if missing := [name for name in FIELDS if name not in entry]:
        raise BadSample(f"bad record: no {missing[0]}")
    image, text, box, words, fake_cls = (entry[name] for name in FIELDS)
    inside("", image)
    if not isinstance(text, str) or not text.strip():
        raise BadSample(f"no caption: text is {str(text)[:80]!r}")
    if not _are_numbers(box) or len(box) not in (0, 4):
        raise BadSample(f"bad record: fake_image_box is {str(box)[:80]}, neither four numbers nor []")
    if not _are_numbers(words) or any(word != int(word) or word < 0 for word in words):
        raise BadSample(f"bad record: fake_text_pos is {str(words)[:80]}, no list of word numbers")
    return Record(image, text, box, [int(word) for word in words], fake_cls, kinds_of(fake_cls))


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST for value in values
    )


def kinds_of(fake_cls: str) -> list[int]:
    """(4,) 0 and 1 by the order of MANIPULATIONS. Raises BadSample for a class that DGM4 does not have.

    The official code takes such a sample for a fake of no kind.
    """
    names = [] if fake_cls == "orig" else str(fake_cls).split("&")
    if unknown := set(names) - set(MANIPULATIONS):
        raise BadSample(f"unknown fake_cls: {sorted(unknown)[0]!r}")
    return [int(name in names) for name in MANIPULATIONS]


def read_records(metadata: Path) -> list[Any]:
    """Entries of a metadata file. Raises UserError."""
    records = read_json(metadata)
    if not isinstance(records, list):
        raise UserError(f"{metadata} holds no list of records but {type(records).__name__}: is it another file?")
    return records


class DGM4(RowDataset):
    """One split: a batch of images with boxes and of captions with labelled tokens.

    Images are opened as the official code does, since boxes are in pixels of the stored image; of a truncated file the rest is
    grey.

    Args:
        root: folder that holds ``DGM4/``.
        metadata: JSON file of the split.
        tokenizer: of the captions.
        image_size: side of the square images in pixels.
        training: augment, and replace bad samples.
        augment: of the pixels of training images; None leaves them as they are.
        flip_probability: of mirroring a training image with its box.
        fraction: share of the records that is kept, the first ones (official ``dataset_division`` k: 1/k).
    """

    def __init__(
        self,
        root: Path,
        metadata: Path,
        tokenizer: CaptionTokenizer,
        image_size: int,
        training: bool = False,
        augment: RandomAugment | None = None,
        flip_probability: float = 0.0,
        fraction: float = 1.0,
    ):
        self.root, self.tokenizer, self.image_size, self.training = root, tokenizer, image_size, training
        self.augment, self.flip_probability = augment, flip_probability
        entries = read_records(metadata)
        self.records: list[Record] = []
        self.skipped: list[Skipped] = []
        for number, entry in enumerate(entries[: max(1, round(len(entries) * fraction))]):
            try:
                record = read_record(entry)
                if not tokenizer.clean(record.text):
                    raise BadSample(f"no caption: nothing of {record.text[:80]!r} is left after cleaning")
                self.records.append(record)
            except BadSample as error:
                self.skipped.append(Skipped(-1, f"{metadata.name}[{number}]", str(error)))
        self.fingerprint = stable_hash([self.records, fraction])

    def __len__(self) -> int:
        return len(self.records)

    def key(self, row: int) -> str:
        return self.records[row].image

    def image(self, row: int) -> Image.Image:
        """The image as it is stored. Raises BadSample."""
        return open_rgb(self.root / self.records[row].image, official=True, truncated=True)

    def text(self, row: int) -> str:
        return self.records[row].text

    def truth(self, row: int) -> tuple[str, list[float], list[int]]:
        """``fake_cls``, ``fake_image_box`` and ``fake_text_pos`` as they are in the file."""
        record = self.records[row]
        return record.fake_cls, record.box, record.words

    def read(self, row: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        image = self.image(row)
        flip = self.training and bool(rng.random() < self.flip_probability)
        augment = partial(self.augment, rng=rng) if self.training and self.augment else None
        return image_tensor(image, self.image_size, flip, augment), box_target(self.records[row].box, image.size, flip)

    def collate(self, rows: list[int], samples: list[tuple[Tensor, Tensor]], request: BatchRequest) -> dict[str, Any]:
        records = [self.records[row] for row in rows]
        tokens = self.tokenizer([record.text for record in records], [record.words for record in records])
        return {
            IMAGE: torch.stack([image for image, _ in samples]),
            BOX: torch.stack([box for _, box in samples]),
            TOKEN_IDS: tokens.input_ids,
            TOKEN_MASK: tokens.mask,
            TOKEN_LABELS: tokens.labels,
            MULTI_LABEL: torch.tensor([record.kinds for record in records]),
            FAKE: torch.tensor([int(record.fake_cls != "orig") for record in records]),
        }


class DGM4DataModule(BaseDataModule):
    """``splits`` maps train, val and test to :class:`DGM4` after ``prepare_data(); setup()``.

    Args:
        root: folder that holds ``DGM4/``; the layout is shown when nothing is found there.
        tokenizer: see :class:`~datamodules.tokenizers.word_labels.CaptionTokenizer`.
        image_size: side of the square the images are resized to.
        batch_size: training samples per device and step (officially 32 on 8 GPUs).
        eval_batch_size: pairs of a batch in validation and test.
        augment: of the pixels of training images, see :class:`DGM4`.
        flip_probability: of mirroring a training image with its box.
        train_fraction: share of the training records that is used.
        simulate: writes a set of the same format, ``simulate(root) -> folder``, used where ``root`` has no ``DGM4/``.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: no metadata, or more bad samples than allowed.
    """

    preprocessing = ("tokenizer", "image_size")

    def __init__(
        self,
        root: str,
        tokenizer: CaptionTokenizer,
        image_size: int = 256,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        augment: RandomAugment | None = None,
        flip_probability: float = 0.5,
        train_fraction: float = 1.0,
        simulate: Callable[[str], Path] | None = None,
        seed: int = 0,
        num_workers: int | Literal["auto"] = "auto",
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        self.root, self.tokenizer, self.image_size, self.simulate = root, tokenizer, image_size, simulate
        self.batch_size, self.eval_batch_size, self.train_fraction = batch_size, eval_batch_size, train_fraction
        self.augment, self.flip_probability = augment, flip_probability

    provides = (INDEX, IMAGE, BOX, TOKEN_IDS, TOKEN_MASK, TOKEN_LABELS, MULTI_LABEL, FAKE)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        root = self.folder()
        for split in SPLITS:
            metadata = root / "DGM4" / "metadata" / f"{split}.json"
            if not metadata.is_file():
                continue
            options: dict[str, Any] = {}
            if split == "train":
                options = {"training": True, "augment": self.augment, "flip_probability": self.flip_probability}
                options["fraction"] = self.train_fraction
            self.splits[split] = DGM4(root, metadata, self.tokenizer, self.image_size, **options)
        if "train" not in self.splits:
            raise UserError(f"datamodule.root: {root} has no DGM4/metadata/train.json. Expected:\n{LAYOUT}")
        for split, dataset in self.splits.items():
            self.report_skipped(split, dataset.skipped)
            counts = Counter(record.fake_cls for record in dataset.records)
            self.notes.append(f"{split}: {len(dataset)} pairs, {counts['orig']} of them pristine.")

    def train_dataloader(self) -> DataLoader:
        return self.train_loader(self.splits["train"], self.batch_size)

    def evaluation_dataloader(self, split: str) -> DataLoader:
        return self.evaluation_loader(self.splits[split], self.eval_batch_size)

    def holds_data(self, root: Path) -> bool:
        return (root / "DGM4").is_dir()


def check_copy(root: Path) -> list[str]:
    """What is wrong with a copy of DGM4 at ``root``, a line each; empty when all of its files can be opened."""
    problems = []
    for split in SPLITS:
        metadata = root / "DGM4" / "metadata" / f"{split}.json"
        if not metadata.is_file():
            problems.append(f"{metadata} is missing")
            continue
        try:
            records = read_records(metadata)
        except UserError as error:
            problems.append(str(error))
            continue
        wrong: Counter[str] = Counter()
        first: dict[str, str] = {}
        for number, entry in enumerate(records):
            name, reason = f"{metadata.name}[{number}]", None
            try:
                path = root / (name := read_record(entry).image)
                head = path.open("rb").read(len(LFS_POINTER)) if path.is_file() else None
                reason = {None: "missing", LFS_POINTER: "a git-lfs pointer", b"": "empty"}.get(head)
            except BadSample as error:
                reason = f"unusable ({error})"
            if reason:
                wrong[reason] += 1
                first.setdefault(reason, name)
        for reason, count in wrong.items():
            problems.append(f"{split}: {count} of {len(records)} images are {reason}, the first is {first[reason]}")
    nested = sorted(root.glob("DGM4/*/*/DGM4"))
    problems += [f"{path} was unpacked one level too deep: move its contents to {root / 'DGM4'}" for path in nested]
    return problems


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m datamodules.dgm4 ROOT")
    problems = check_copy(Path(sys.argv[1]))
    print("\n".join(problems) or "every image of every split is there")
    sys.exit(bool(problems))
