"""Writes simulated scenes as the tar shards that img2dataset makes, so that demos go through the reader of real data."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

from datamodules.simulated.scenes import CLASS_NAMES, draw, scene
from models.io import atomic_directory

SHARD_SIZE = 1000  # samples per tar, so that several workers have something to share


class SceneShards:
    """Simulated captioned scenes in ``train/``, ``val/`` and ``test/``, with ``classes.txt``.

    Args:
        train, val, test: samples per split. image_size: pixels. seed: of the world.
    """

    def __init__(self, train: int, val: int, test: int, image_size: int = 128, seed: int = 0):
        self.sizes = {"train": train, "val": val, "test": test}
        self.image_size, self.seed = image_size, seed

    def write(self, root: Path, limit: int | None = None) -> None:
        """Write the whole set at ``root``, in one step: it is there completely or not at all."""
        start = 0
        with atomic_directory(root) as folder:
            (folder / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n")
            for split, size in self.sizes.items():
                indices = range(start, start + min(size, limit or size))
                start += size
                (folder / split).mkdir()
                for number, first in enumerate(range(0, len(indices), SHARD_SIZE)):
                    with tarfile.open(folder / split / f"{number:05d}.tar", "w") as tar:
                        for index in indices[first : first + SHARD_SIZE]:
                            self._add(tar, index)

    def _add(self, tar: tarfile.TarFile, index: int) -> None:
        content = scene(self.seed, index)
        image = io.BytesIO()
        draw(content, self.image_size).save(image, "JPEG", quality=92)
        record = {"captions": list(content.captions[1:]), "label": content.label, "key": f"{index:09d}"}
        files = {"jpg": image.getvalue(), "txt": content.captions[0].encode(), "json": json.dumps(record).encode()}
        for suffix, data in files.items():
            info = tarfile.TarInfo(f"{index:09d}.{suffix}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
