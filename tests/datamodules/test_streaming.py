"""Streaming: every sample of a round once, every loss counted, and no worker without a shard."""

import http.server
import os
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from torchvision.transforms.functional import pil_to_tensor

from datamodules.streaming import StreamedImageText, stream_samples
from models.batch import CAPTIONS, IMAGE, INDEX, KEY, SKIPPED, Skipped
from models.errors import UserError
from tests.datamodules.conftest import sample_files, write_shards, write_tar

FIELDS = ("caption", "captions")


def stream(root, shards=5, **arguments):
    arguments = {"samples_per_epoch": 40, "batch_size": 4, "num_workers": 0, "shuffle_buffer": 3} | arguments
    data = StreamedImageText(f"{root}/{{00000..{shards - 1:05d}}}.tar", transform=pil_to_tensor, **arguments)
    data.setup()
    return data


def batches(data, epoch=0, batch=0):
    data._position |= {"epoch": epoch, "batch": batch}
    return list(data.train_dataloader())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_round_gives_every_sample_once(tmp_path, workers):
    write_shards(tmp_path, count=40, per_shard=8)
    found = batches(stream(tmp_path, num_workers=workers))
    assert len(found) == 10 == len(stream(tmp_path).train_dataloader())
    keys = [key for batch in found for key in batch[KEY]]
    assert len(keys) == 40 and (workers or len(set(keys)) == 40)
    assert len(set(torch.cat([batch[INDEX] for batch in found]).tolist())) == 40
    first = found[0]
    assert first[IMAGE].shape == (4, 3, 24, 24) and first[CAPTIONS][0][0] == f"caption {int(first[KEY][0])}"
    assert keys != sorted(keys)


def test_order_follows_seed_and_epoch(tmp_path):
    write_shards(tmp_path, count=40, per_shard=8)

    def keys(epoch=0, **arguments):
        return [batch[KEY] for batch in batches(stream(tmp_path, **arguments), epoch)]

    assert keys() == keys() != keys(epoch=1) and keys(seed=1) != keys()


def test_a_resumed_epoch_has_the_steps_that_are_left(tmp_path):
    write_shards(tmp_path, count=40, per_shard=8)
    data = stream(tmp_path)
    data._check_position(40, 4)
    assert len(batches(data, batch=7)) == 3


def test_ranks_read_different_shards(tmp_path, monkeypatch):
    write_shards(tmp_path, count=40, per_shard=8)
    seen = []
    for rank in range(2):
        data = stream(tmp_path, samples_per_epoch=16)
        monkeypatch.setattr(data, "_rank", lambda rank=rank: rank)
        monkeypatch.setattr(data, "_world_size", lambda: 2)
        seen.append({key for batch in batches(data) for key in batch[KEY]})
    assert not seen[0] & seen[1] and all(len(keys) == 8 for keys in seen)


def test_fewer_shards_than_readers(tmp_path, monkeypatch):
    data = stream(tmp_path, shards=5, num_workers=3)
    monkeypatch.setattr(data, "_world_size", lambda: 2)
    with pytest.raises(UserError, match="5 shards cannot be shared among 3 workers on each of 2 devices: 1 of 6 .*at most 2"):
        data.train_dataloader()
    with pytest.raises(UserError, match="less than a batch"):
        stream(tmp_path, samples_per_epoch=3).train_dataloader()
    with pytest.raises(UserError, match="no commands"):
        StreamedImageText("pipe:cat x.tar", pil_to_tensor, 1, 1)


def test_unsorted_duplicate_and_incomplete_samples_are_counted(tmp_path):
    files = {k: v for n in range(6) for k, v in sample_files(n).items()}
    picture = files.pop("000000001.jpg")
    listed = [*files.items(), ("000000001.jpg", picture), *sample_files(2).items(), ("000000009.jpg", picture)]
    write_tar(tmp_path / "0.tar", listed)
    found = list(stream_samples(str(tmp_path / "0.tar"), FIELDS))
    good = [sample[KEY] for sample in found if not isinstance(sample, Skipped)]
    assert good == [f"{n:09d}" for n in (0, 2, 3, 4, 5)]
    skips = [(entry.key, entry.reason.split(":")[0]) for entry in found if isinstance(entry, Skipped)]
    assert skips == [
        ("000000001", "no image"),
        ("000000001", "unsorted or duplicate key"),
        ("000000002", "unsorted or duplicate key"),
        ("000000009", "no caption"),
    ]


def test_cut_and_missing_shards_and_broken_images(tmp_path):
    write_shards(tmp_path, count=24, per_shard=8)
    path = tmp_path / "00001.tar"
    os.truncate(path, path.stat().st_size // 2)
    found = list(stream_samples(str(path), FIELDS))
    assert isinstance(found[-1], Skipped) and found[-1].reason.startswith("truncated shard") and 2 <= len(found) - 1 <= 4
    (missing,) = stream_samples(str(tmp_path / "none.tar"), FIELDS)
    assert "FileNotFoundError" in missing.reason
    files = sample_files(77)
    files["000000077.jpg"] = b"broken"
    write_tar(tmp_path / "00002.tar", {**files, **sample_files(78)})
    data = stream(tmp_path, shards=3, samples_per_epoch=12)
    skips = {entry.reason.split(":")[0] for batch in batches(data) for entry in batch[SKIPPED]}
    assert skips == {"truncated shard", "corrupt image"}
    for shard in range(3):
        (tmp_path / f"{shard:05d}.tar").unlink()
    with pytest.raises(UserError, match="no usable sample in 3 shards"):
        batches(data)


def test_shards_come_over_http_where_commands_are_refused(tmp_path):
    write_shards(tmp_path, count=8, per_shard=4)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = f"""
from datamodules.streaming import stream_samples
print(sum("key" in s for s in stream_samples("http://127.0.0.1:{server.server_port}/00000.tar", {FIELDS!r})))
"""
    try:
        out = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "WDS_SECURE": "1"}, capture_output=True, text=True
        )
    finally:
        server.shutdown()
    assert out.stdout.strip() == "4", out.stderr
