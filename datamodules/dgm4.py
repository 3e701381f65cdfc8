"""DGM4: manipulated and pristine image-text pairs with boxes and word positions, in the official files.

``python -m datamodules.dgm4 ROOT`` says what is missing or unusable in a copy.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datamodules.base import BaseDataModule
from datamodules.order import BatchRequest
from datamodules.tokenizers.captions import CaptionTokenizer
from datamodules.transforms.augment import RandomAugment
from datamodules.transforms.image_box import box_target, image_tensor
from models.batch import IMAGE, INDEX, SKIPPED, TOKEN_IDS, TOKEN_MASK, Skipped
from models.errors import UserError
from models.hammer.batch import BOX, FAKE, MULTI_LABEL, TOKEN_LABELS
from models.hammer.model import MANIPULATIONS
from models.io import stable_hash

SPLITS = ("train", "val", "test")
LAYOUT = """  <root>/DGM4/metadata/{train,val,test}.json
  <root>/DGM4/manipulation/{infoswap,simswap,StyleCLIP,HFGI}/*.jpg
  <root>/DGM4/origin/{guardian,usa_today,washington_post,bbc}/*/*.jpg"""
LFS_POINTER = b"version https://git-lfs"


def kinds_of(fake_cls: str) -> list[int]:
    """(4,) 0 and 1 by the order of MANIPULATIONS. Raises KeyError for a class that DGM4 does not have.

    The official code takes such a sample for a fake of no kind.
    """
    names = [] if fake_cls == "orig" else fake_cls.split("&")
    if unknown := set(names) - set(MANIPULATIONS):
        raise KeyError(f"unknown fake_cls: {sorted(unknown)[0]!r}")
    return [int(name in names) for name in MANIPULATIONS]


def read_image(path: Path) -> Image.Image:
    """RGB picture; a truncated file gives what there is of it, as officially. Raises OSError saying what is wrong."""
    if not path.is_file():
        raise OSError("no such image")
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        return Image.open(path).convert("RGB")
    except UnidentifiedImageError as error:
        if path.read_bytes()[: len(LFS_POINTER)] == LFS_POINTER:
            raise OSError("git-lfs pointer: the copy was made without `git lfs pull`") from error
        raise OSError("broken image") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


class DGM4(Dataset):
    """One split; ``dataset[BatchRequest]`` reads, augments and tokenises a whole batch.

    Args:
        root: folder that holds ``DGM4/``.
        metadata: the split's JSON file.
        tokenizer, image_size: what the model reads.
        augment: of the pixels of training images; None leaves them, and their side, alone (evaluation).
        flip_probability: of mirroring a training image with its box.
        fraction: share of the records that is kept, the first ones (official ``dataset_division`` k: 1/k).
    """

    def __init__(
        self,
        root: Path,
        metadata: Path,
        tokenizer: CaptionTokenizer,
        image_size: int,
        augment: RandomAugment | None = None,
        flip_probability: float = 0.0,
        fraction: float = 1.0,
    ):
        self.root, self.tokenizer, self.image_size = root, tokenizer, image_size
        self.augment, self.flip_probability = augment, flip_probability
        content = metadata.read_text(encoding="utf-8")
        try:
            records = json.loads(content)
        except json.JSONDecodeError as error:
            raise UserError(f"{metadata} is not JSON ({error}): is it a git-lfs pointer, or half a download?") from error
        self.records, self.skipped = [], []
        for i, record in enumerate(records[: max(1, round(len(records) * fraction))]):
            try:
                row = (record["image"], record["text"], record["fake_image_box"], record["fake_text_pos"])
                self.records.append((*row, record["fake_cls"], kinds_of(record["fake_cls"])))
            except KeyError as error:
                self.skipped.append(Skipped(-1, f"{metadata.name}[{i}]", str(error.args[0])))
        self.fingerprint = stable_hash([content, fraction])

    def __len__(self) -> int:
        return len(self.records)

    def image(self, row: int) -> Image.Image:
        """The picture as it is stored. Raises OSError."""
        return read_image(self.root / self.records[row][0])

    def text(self, row: int) -> str:
        return self.records[row][1]

    def truth(self, row: int) -> tuple[str, list[float], list[int]]:
        """``fake_cls``, ``fake_image_box`` and ``fake_text_pos`` as they are in the file."""
        _, _, box, words, fake_cls, _ = self.records[row]
        return fake_cls, box, words

    def __getitem__(self, request: BatchRequest) -> dict[str, Any]:
        rows, images, boxes, skipped = [], [], [], []
        for row in request.rows.tolist():
            try:
                image, box = self._image_and_box(row, np.random.default_rng((request.seed, request.epoch, row)))
            except OSError as error:
                skipped.append(Skipped(row, self.records[row][0], str(error)))
                continue
            rows.append(row)
            images.append(image)
            boxes.append(box)
        if not rows:
            return {INDEX: torch.empty(0, dtype=torch.int64), SKIPPED: skipped}
        records = [self.records[row] for row in rows]
        tokens = self.tokenizer([record[1] for record in records], [record[3] for record in records])
        kinds = torch.tensor([record[5] for record in records])
        return {
            INDEX: torch.tensor(rows),
            IMAGE: torch.stack(images),
            BOX: torch.stack(boxes),
            TOKEN_IDS: tokens.input_ids,
            TOKEN_MASK: tokens.mask,
            TOKEN_LABELS: tokens.labels,
            MULTI_LABEL: kinds,
            FAKE: torch.tensor([int(record[4] != "orig") for record in records]),
            SKIPPED: skipped,
        }

    def _image_and_box(self, row: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        image, box = self.image(row), self.records[row][2]
        flip = bool(rng.random() < self.flip_probability)
        augment = partial(self.augment, rng=rng) if self.augment else None
        return image_tensor(image, self.image_size, flip, augment), box_target(box, image.size, flip)


class DGM4DataModule(BaseDataModule):
    """``splits`` maps train, val and test to :class:`DGM4` after ``prepare_data(); setup()``.

    Args:
        root: folder that holds ``DGM4/``; the layout is shown when nothing is found there.
        tokenizer: see :class:`~datamodules.tokenizers.captions.CaptionTokenizer`.
        image_size: side of the square the images are resized to.
        batch_size: training samples per device and step (officially 32 on 8 GPUs).
        eval_batch_size: of validation and test.
        augment, flip_probability: of training images, see :class:`DGM4`.
        train_fraction: share of the training records that is used.
        simulate: writes a set of the same format, ``simulate(root) -> folder``, used where ``root`` has no ``DGM4/``.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.
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
        num_workers: int = 4,
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
            only_train = {"augment": self.augment, "flip_probability": self.flip_probability, "fraction": self.train_fraction}
            options = only_train if split == "train" else {}
            self.splits[split] = DGM4(root, metadata, self.tokenizer, self.image_size, **options)
        if "train" not in self.splits:
            raise UserError(f"datamodule.root: {root} has no DGM4/metadata/train.json. Expected:\n{LAYOUT}")
        for split, dataset in self.splits.items():
            self.report_skipped(split, dataset.skipped)
            counts = Counter(record[4] for record in dataset.records)
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
            records = json.loads(metadata.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            problems.append(f"{metadata} is not JSON: fetch it again (with `git lfs pull`, if by git)")
            continue
        wrong: Counter[str] = Counter()
        first: dict[str, str] = {}
        for record in records:
            path = root / record["image"]
            head = path.open("rb").read(len(LFS_POINTER)) if path.is_file() else None
            reason = "missing" if head is None else "a git-lfs pointer" if head == LFS_POINTER else None
            reason = "empty" if head == b"" else reason
            if reason:
                wrong[reason] += 1
                first.setdefault(reason, record["image"])
        for reason, count in wrong.items():
            problems.append(f"{split}: {count} of {len(records)} images are {reason}, the first is {first[reason]}")
    nested = sorted(root.glob("DGM4/*/*/DGM4"))
    problems += [f"{path} was unpacked one level too deep: move its contents to {root / 'DGM4'}" for path in nested]
    return problems


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m datamodules.dgm4 ROOT")
    found = check_copy(Path(sys.argv[1]))
    print("\n".join(found) or "every image of every split is there")
    sys.exit(bool(found))
