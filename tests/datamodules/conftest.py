"""Small shards of exactly the layout that img2dataset writes, and ways to damage them."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image


def image_bytes(seed: int = 0, size: int = 24, form: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def sample_files(number: int, **record) -> dict[str, bytes]:
    """The files of sample ``number``: an image, a caption line and a json record with two captions."""
    key = f"{number:09d}"
    record = {"captions": [f"long caption {number}", f"longer caption {number}"], **record}
    return {
        f"{key}.jpg": image_bytes(number),
        f"{key}.txt": f"caption {number}\n".encode(),
        f"{key}.json": json.dumps(record).encode(),
    }


def write_tar(path, files: dict[str, bytes] | list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT):
    """Write files in order; a list may name a file twice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in files.items() if isinstance(files, dict) else files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1700000000.5  # a fraction makes tarfile write pax headers where the form allows them
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(root, count: int = 12, per_shard: int = 5, split: str = ""):
    for first in range(0, count, per_shard):
        files = {}
        for number in range(first, min(first + per_shard, count)):
            files |= sample_files(number, label=number % 3)
        write_tar(root / split / f"{first // per_shard:05d}.tar", files)
    return root


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
