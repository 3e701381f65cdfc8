"""Webdataset-style tar shards of clips: KEY.mp4 (webm, mkv, avi, gif), KEY.txt and KEY.json, read in place and in any order."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from datamodules.readers.clips import Media
from datamodules.readers.video_annotations.sample import Annotations, MissingSplit, Sample
from models.batch import Skipped

SUFFIXES = {"mp4", "webm", "mkv", "avi", "gif"}


def clip_shards(root: str, split: str) -> Annotations:
    """``<root>/<split>/*.tar``. The caption is KEY.txt, or the field ``caption`` of KEY.json.

    Every header is read once, at the start. A shard that is cut off keeps the samples before the cut; these and incomplete
    samples are counted as skipped.
    """
    shards = sorted(Path(root, split).glob("*.tar"))
    if not shards:
        raise MissingSplit(split)
    samples: list[Sample] = []
    skipped: list[Skipped] = []
    for shard in shards:
        found, texts, broken = _index(shard)
        skipped += broken
        for key in dict.fromkeys([*found, *texts]):
            if key not in found or not texts.get(key):
                lack = "clip" if key not in found else "caption"
                skipped.append(Skipped(-1, f"{shard.name}/{key}", f"incomplete sample: no {lack}"))
            else:
                samples.append(Sample(key, found[key], (texts[key],)))
    return Annotations(samples, skipped=skipped)


def _index(shard: Path) -> tuple[dict[str, Media], dict[str, str], list[Skipped]]:
    found: dict[str, Media] = {}
    texts: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if not member.isfile():
                    continue
                if suffix in SUFFIXES:
                    if member.offset_data + member.size > shard.stat().st_size:
                        raise tarfile.ReadError(f"cut off inside {member.name}")
                    found[key] = Media(str(shard), "tar", offset=member.offset_data, size=member.size)
                elif suffix == "txt":
                    texts[key] = tar.extractfile(member).read().decode(errors="replace").strip()
                elif suffix == "json":
                    caption = json.loads(tar.extractfile(member).read()).get("caption", "")
                    texts.setdefault(key, caption)
    except (tarfile.TarError, OSError, ValueError) as error:
        return found, texts, [Skipped(-1, shard.name, f"truncated shard: {error}; the samples before the cut are kept")]
    return found, texts, []
