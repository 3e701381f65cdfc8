"""Image-text pairs streamed from webdataset shards that lie elsewhere: a second mode, which promises less.

What local data promises (:mod:`datamodules.order`) and a stream does not:

* the order depends on the number of workers and ranks, and a sample is shuffled among its neighbours only;
* an epoch is ``samples_per_epoch`` samples by definition; with uneven shards some samples come twice, others never;
* a resumed run goes on with the right step and learning rate but other samples: it starts a new draw of the shards;
* what is not in a shard side by side under one name is lost, where an index of local shards would find it.

Every loss is still counted. For methods that train on raw data; recipes that encode first need their data on disk, since a
feature store is written by position.
"""

from __future__ import annotations

import itertools
import lzma
import random
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls

from datamodules.base import BaseDataModule
from datamodules.readers.base import BadSample
from datamodules.readers.images import open_rgb
from datamodules.readers.tar_index import LARGEST_IMAGE, LARGEST_TEXT, ROLES, parse_record, read_captions
from datamodules.rows import as_is
from models.batch import CAPTIONS, IMAGE, INDEX, KEY, SKIPPED, Skipped
from models.errors import UserError


class StreamedImageText(BaseDataModule):
    """Batches of KEY, IMAGE (B, 3, H, W), CAPTIONS (list of lists) and INDEX (running numbers: a stream has no rows).

    Args:
        shards: URLs (http, https, gs, hf, ...) or local paths of tars, with ``{00000..00999}`` for ranges.
        transform: ``PIL.Image -> (3, H, W)``, such as an encoder's ``preprocess``.
        samples_per_epoch: what counts as an epoch, on all devices together.
        batch_size: samples of a step on one device.
        shuffle_buffer: samples of a worker that are held back to be drawn from; 1: in the order of the shard.
        caption_fields: of KEY.json, after the lines of KEY.txt.
        seed, num_workers, max_skipped: see :class:`BaseDataModule`.

    Raises:
        UserError: fewer shards than workers x ranks, which would leave some without data; a shard of an unsafe kind.
    """

    def __init__(
        self,
        shards: str | Sequence[str],
        transform: Callable[[Image.Image], Tensor],
        samples_per_epoch: int,
        batch_size: int,
        shuffle_buffer: int = 1000,
        caption_fields: Sequence[str] = ("caption", "captions"),
        seed: int = 0,
        num_workers: int | Literal["auto"] = "auto",
        max_skipped: float = 0.05,
    ):
        super().__init__(seed=seed, num_workers=num_workers, max_skipped=max_skipped)
        self.shards = [url for part in ([shards] if isinstance(shards, str) else shards) for url in expand_urls(part)]
        unsafe = [url for url in self.shards if urlparse(url).scheme == "pipe" or url == "-"]
        if unsafe or not self.shards:
            raise UserError(f"datamodule.shards: {unsafe[0] if unsafe else 'none'}: give URLs or paths of tars, no commands.")
        if min(samples_per_epoch, batch_size, shuffle_buffer) < 1:
            raise UserError("datamodule.samples_per_epoch, batch_size and shuffle_buffer must be at least 1.")
        self.transform, self.caption_fields = transform, tuple(caption_fields)
        self.samples_per_epoch, self.batch_size, self.shuffle_buffer = samples_per_epoch, batch_size, shuffle_buffer

    def setup(self, stage: str | None = None) -> None:
        self.splits = {"train": range(self.samples_per_epoch)}  # its length alone counts: a stream has no rows

    def train_dataloader(self) -> DataLoader:
        workers = self.workers()
        if self.num_workers == "auto":
            workers = min(workers, len(self.shards) // self._world_size())
        readers = max(workers, 1) * self._world_size()
        if len(self.shards) < readers:
            raise UserError(
                f"{len(self.shards)} shards cannot be shared among {max(workers, 1)} workers on each of "
                f"{self._world_size()} devices: {readers - len(self.shards)} of {readers} would have nothing to read. Set "
                f"datamodule.num_workers to at most {len(self.shards) // self._world_size()}, use fewer devices, or cut the "
                "data into more shards."
            )
        steps = self.samples_per_epoch // (self.batch_size * self._world_size())
        if steps == 0:
            raise UserError(
                f"datamodule.samples_per_epoch={self.samples_per_epoch} is less than a batch of {self.batch_size} on each of "
                f"{self._world_size()} devices."
            )
        self._check_position(self.samples_per_epoch, self.batch_size * self._world_size())
        stream = _Batches(self, steps, self._rank(), self._world_size())
        pin = self._on_gpu()
        return DataLoader(stream, batch_size=None, num_workers=workers, collate_fn=as_is, pin_memory=pin)


class _Batches(IterableDataset):
    """``steps`` batches, whole ones, made by the workers in turn; shards are drawn anew whenever they are used up."""

    def __init__(self, data: StreamedImageText, steps: int, rank: int, world_size: int):
        self.shards, self.transform, self.caption_fields = data.shards, data.transform, data.caption_fields
        self.batch_size, self.buffer, self.seed = data.batch_size, data.shuffle_buffer, data.seed
        self.steps, self.rank, self.world_size = steps, rank, world_size
        self.position = data.position

    def __len__(self) -> int:
        return self.steps

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "position": partial(tuple, self.position())}  # the trainer stays in the main process

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        epoch, done = self.position()
        left = self.steps - done
        mine = left // workers + (number < left % workers)
        return self._batches(mine, epoch, done, self.rank * workers + number, self.world_size * workers)

    def _batches(self, count: int, epoch: int, done: int, reader: int, readers: int) -> Iterator[dict]:
        samples = self._shuffled(random.Random(f"{self.seed}/{epoch}/{done}/{reader}"), epoch, done, reader, readers)
        serial = 0
        for _ in range(count):
            batch: list[dict] = []
            skipped: list[Skipped] = []
            while len(batch) < self.batch_size:
                sample = next(samples)
                if isinstance(sample, Skipped):
                    skipped.append(sample)
                else:
                    batch.append(sample)
            index = torch.arange(serial, serial + len(batch)) * readers + reader
            serial += len(batch)
            yield {
                INDEX: index,
                KEY: [sample[KEY] for sample in batch],
                IMAGE: torch.stack([sample[IMAGE] for sample in batch]),
                CAPTIONS: [sample[CAPTIONS] for sample in batch],
                SKIPPED: skipped,
            }

    def _shuffled(self, rng: random.Random, epoch: int, done: int, reader: int, readers: int) -> Iterator[dict | Skipped]:
        """Samples of this reader's shards, round after round; skips pass at once, samples through the buffer."""
        buffer: list[dict[str, Any]] = []
        for turn in itertools.count():
            order = list(range(len(self.shards)))
            random.Random(f"{self.seed}/{epoch}/{done}/{turn}").shuffle(order)  # the same draw for all readers
            any_sample = False
            for shard in order[reader::readers]:
                for sample in stream_samples(self.shards[shard], self.caption_fields):
                    if isinstance(sample, Skipped):
                        yield sample
                        continue
                    any_sample = True
                    if len(buffer) >= self.buffer:
                        place = rng.randrange(len(buffer))
                        buffer[place], sample = sample, buffer[place]
                        yield self._decoded(sample)
                    else:
                        buffer.append(sample)
            if not any_sample:
                named = [self.shards[shard] for shard in order[reader::readers]]
                raise UserError(f"no usable sample in {len(named)} shards, the first is {named[0]}: can they be read?")
            rng.shuffle(buffer)
            while buffer:  # a round ends before the next begins: no sample comes three times before another comes once
                yield self._decoded(buffer.pop())

    def _decoded(self, sample: dict[str, Any]) -> dict | Skipped:
        try:
            return {**sample, IMAGE: self.transform(open_rgb(sample[IMAGE]))}
        except BadSample as error:
            return Skipped(-1, sample[KEY], str(error))


def stream_samples(url: str, caption_fields: tuple[str, ...]) -> Iterator[dict[str, Any] | Skipped]:
    """KEY, IMAGE (bytes) and CAPTIONS of one tar that is read from front to back.

    The files of a sample must stand side by side. A key that comes again, a sample without image or caption, and a shard that
    cannot be opened or ends early become :class:`Skipped`, whose ``key`` names them.
    """
    shard = url.rsplit("/", 1)[-1]
    closed: set[int] = set()
    key: str | None = None
    files: dict[str, bytes | None] = {}
    try:
        with _open(url) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
            for member in tar:
                name, _, suffix = member.name.rpartition(".")
                role = ROLES.get(suffix.lower())
                if not member.isreg() or role is None or name.rpartition("/")[2].startswith("."):
                    continue
                if name != key:
                    if key is not None:
                        yield _sample(key, files, caption_fields, closed, shard)
                    key, files = name, {}
                limit = LARGEST_IMAGE if role == "image" else LARGEST_TEXT
                files.setdefault(role, tar.extractfile(member).read() if member.size <= limit else None)
                tar.members = []  # type: ignore[attr-defined]  # else it remembers every header
        if key is not None:
            yield _sample(key, files, caption_fields, closed, shard)
    except (OSError, tarfile.TarError, ValueError, EOFError, OverflowError, zlib.error, lzma.LZMAError) as error:
        # The sample that was being read may be cut: it is lost with the rest.
        yield Skipped(-1, url, f"truncated shard: {type(error).__name__}: {error}; what came before is used")


def _sample(
    key: str, files: dict[str, bytes | None], caption_fields: tuple[str, ...], closed: set[int], shard: str
) -> dict | Skipped:
    if hash(key) in closed:
        reason = f"unsorted or duplicate key: again in {shard}, where its files must stand side by side"
        return Skipped(-1, key, reason)
    closed.add(hash(key))
    if None in files.values():
        return Skipped(-1, key, f"too large: a file of it in {shard}")
    try:
        captions = read_captions(files.get("text", b""), parse_record(files.get("json", b"")), caption_fields)
    except ValueError as error:
        return Skipped(-1, key, f"bad json: {error} (in {shard})")
    if not files.get("image") or not captions:
        return Skipped(-1, key, f"{'no caption' if files.get('image') else 'no image'}: beside each other in {shard}")
    return {KEY: key, IMAGE: files["image"], CAPTIONS: captions}


def _open(url: str) -> Any:
    """Local paths are opened here: webdataset's own guard (WDS_SECURE) refuses them together with commands."""
    return Path(url).open("rb") if not urlparse(url).scheme else gopen(url)
