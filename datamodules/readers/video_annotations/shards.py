"""Webdataset-style tar shards of clips: KEY.mp4 (or another video), KEY.txt and KEY.json, read in place and in any order."""

from __future__ import annotations

import os
from pathlib import Path

from datamodules.readers.clip import VIDEO_SUFFIXES, ClipSource
from datamodules.readers.tar_index import index_members, parse_record, read_captions
from datamodules.readers.video_annotations.sample import Annotations, MissingSplit, Sample
from models.batch import Skipped

ROLES = {**{suffix[1:]: "clip" for suffix in VIDEO_SUFFIXES}, "txt": "text", "json": "json"}


def clip_shards(root: str, split: str) -> Annotations:
    """``<root>/<split>/*.tar``. Captions are the lines of KEY.txt and the field ``caption`` of KEY.json.

    Every header is read once, at the start. A shard that is cut off keeps the samples before the cut; what it lost, incomplete
    samples and second samples of a key are counted as skipped.
    """
    shards = sorted(Path(root, split).glob("*.tar"))
    if not shards:
        raise MissingSplit(split)
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for shard in shards:
        handle = os.open(shard, os.O_RDONLY)
        try:
            members, broken = index_members(handle, shard.name, ROLES)
            skipped += broken
            for key, roles in members.items():
                sample = _sample(handle, shard, key, roles, seen)
                if isinstance(sample, Skipped):
                    skipped.append(sample)
                else:
                    samples.append(sample)
                seen.add(key)
        finally:
            os.close(handle)
    return Annotations(samples, skipped=skipped)


def _sample(handle: int, shard: Path, key: str, roles: dict[str, tuple[int, int]], seen: set[str]) -> Sample | Skipped:
    if key in seen:
        return Skipped(-1, key, f"duplicate key: again in {shard.name}, the first is used")
    text, record = (os.pread(handle, size, start) for start, size in (roles.get(r, (0, 0)) for r in ("text", "json")))
    try:
        captions = read_captions(text, parse_record(record), ("caption",))
    except ValueError as error:
        return Skipped(-1, key, f"bad json: {error} (in {shard.name})")
    if not captions or "clip" not in roles:
        return Skipped(-1, key, f"incomplete sample: no {'caption' if 'clip' in roles else 'clip'} (in {shard.name})")
    start, size = roles["clip"]
    return Sample(key, ClipSource(str(shard), "tar", offset=start, size=size), tuple(captions))
