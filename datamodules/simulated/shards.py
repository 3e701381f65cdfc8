"""Writes simulated scenes as tar shards, exactly as img2dataset lays out a downloaded corpus."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from datamodules.simulated.scenes import CLASS_NAMES, captions, make_scene, render
from datamodules.simulated.worlds import SPLIT_STARTS
from models.io import atomic_directory, stable_hash

WORLD = 1  # raise it when the same arguments would give other scenes, images or words


def write_scene_shards(
    root: str,
    train: int = 6000,
    val: int = 500,
    test: int = 1000,
    image_size: int = 128,
    per_shard: int = 1000,
    seed: int = 0,
    longer_captions: int = 2,
) -> Path:
    """The folder with the simulated set of these arguments, written unless it is there already.

    It is ``root/scenes_<hash of the arguments>`` with ``train/``, ``val/``, ``test/`` and ``classes.txt``. It appears
    whole or not at all, so a killed run leaves nothing half-written behind.

    Args:
        train, val, test: number of scenes; a split of 0 scenes is left out.
        image_size: side of the square JPEGs in pixels.
        per_shard: scenes in one tar.
        seed: of the world.
        longer_captions: 1 or 2 long captions of each scene, beside its short one.
    """
    sizes = {"train": train, "val": val, "test": test}
    folder = Path(root, f"scenes_{stable_hash([WORLD, sizes, image_size, per_shard, seed, longer_captions])}")
    if folder.is_dir():
        return folder
    with atomic_directory(folder) as temporary:
        (temporary / "classes.txt").write_text("\n".join(CLASS_NAMES) + "\n")
        for split, count in sizes.items():
            for shard, first in enumerate(range(0, count, per_shard)):
                path = temporary / split / f"{shard:05d}.tar"
                path.parent.mkdir(exist_ok=True)
                numbers = range(first, min(first + per_shard, count))
                indices = (SPLIT_STARTS[split] + number for number in numbers)
                write_tar(path, (scene_files(seed, index, image_size, longer_captions) for index in indices))
    return folder


def scene_files(seed: int, index: int, image_size: int, longer_captions: int) -> dict[str, bytes]:
    """KEY.jpg, KEY.txt and KEY.json of one scene."""
    scene = make_scene(seed, index)
    raw, *longer = captions(scene)[: 1 + longer_captions]
    image = io.BytesIO()
    render(scene, image_size).save(image, "JPEG", quality=92)
    record = {"caption": raw, "captions": longer, "label": scene.label, "class": CLASS_NAMES[scene.label]}
    key = f"{index:010d}"
    return {f"{key}.jpg": image.getvalue(), f"{key}.txt": raw.encode(), f"{key}.json": json.dumps(record).encode()}


def write_tar(path: Path, samples: Iterable[dict[str, bytes]]) -> None:
    """A plain tar of the samples' files in order; the same bytes whenever it is written."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for files in samples:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
