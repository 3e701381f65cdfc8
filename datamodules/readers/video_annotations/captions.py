"""Official annotation formats of captioned clips: pre-training and text-video retrieval.

Every reader is a function ``(root, split) -> Annotations``; split is train, val or test, and a data set without an own file
for one of them raises MissingSplit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datamodules.readers.clip import ClipSource
from datamodules.readers.video_annotations.sample import (
    AnnotationError,
    Annotations,
    Sample,
    choose,
    collect,
    json_file,
    json_records,
    lines,
    metadata,
    plain_pickle,
    table,
    video,
)

VIDEO_SUFFIXES = (".avi", ".mp4", ".webm")


def webvid(root: str, split: str) -> Annotations:
    """WebVid-2M: ``webvid_{training,validation}_success_full.tsv`` (caption, path without suffix)."""
    part, folder = choose(split, {"train": ("training", "train"), "val": ("validation", "val")})
    rows = table(metadata(root, "webvid") / f"webvid_{part}_success_full.tsv", 2, header=True)
    return collect(rows, lambda row: Sample(row[1], video(root, "webvid", folder, f"{row[1]}.mp4"), (row[0],)))


def cc3m(root: str, split: str) -> Annotations:
    """CC3M: ``cc3m_{training,validation}_success_full.tsv`` (caption, file)."""
    (part,) = choose(split, {"train": ("training",), "val": ("validation",)})
    rows = table(metadata(root, "cc3m") / f"cc3m_{part}_success_full.tsv", 2, header=True)
    return collect(rows, lambda row: Sample(row[1], video(root, "cc3m", part, row[1], kind="image"), (row[0],)))


def cc12m(root: str, split: str) -> Annotations:
    """CC12M: ``{train,val,test}.tsv`` (caption, path of which the last part counts)."""

    def sample_of(row: list[str]) -> Sample:
        name = Path(row[1]).name
        return Sample(name, video(root, "cc12m", name, kind="image"), (row[0],))

    return collect(table(metadata(root, "cc12m") / f"{split}.tsv", 2, header=True), sample_of)


def msrvtt_retrieval(root: str, split: str) -> Annotations:
    """MSR-VTT 9k/1k ("jsfusion"): every caption of a training clip, the one listed caption of a test clip."""
    (listed,) = choose(split, {"train": ("train",), "test": ("val",)})
    base = Path(root, "msrvtt")
    source = base / "annotation" / "MSR_VTT.json"
    captions: dict[str, list[str]] = {}
    content = json_file(source)
    try:
        for entry in content["annotations"]:
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
    except (TypeError, KeyError) as error:
        raise AnnotationError(f"{source} has no list 'annotations' of image_id and caption ({error!r}).") from None
    lists = base / "high-quality" / "structured-symlinks"
    chosen = plain_pickle(lists / "jsfusion_val_caption_idx.pkl") if split == "test" else {}

    def sample_of(line: str) -> Sample:
        name = line.strip()
        texts = (captions[name][chosen[name]],) if split == "test" else tuple(captions[name])
        return Sample(name, video(root, "msrvtt", "videos", "all", f"{name}.mp4"), texts)

    return collect(lines(lists / f"{listed}_list_jsfusion.txt"), sample_of)


def msvd_retrieval(root: str, split: str) -> Annotations:
    """MSVD: ``MSVD_{train,test}.tsv`` (captions joined by commas, name). The format cuts sentences that hold commas."""
    choose(split, {"train": (), "test": ()})

    def sample_of(row: list[str]) -> Sample:
        texts = tuple(text.strip() for text in row[0].split(",") if text.strip())
        name = row[1] if Path(row[1]).suffix in VIDEO_SUFFIXES else f"{row[1]}.avi"
        return Sample(row[1], video(root, "msvd", "YouTubeClips", name), texts)

    return collect(table(metadata(root, "msvd") / f"MSVD_{split}.tsv", 2), sample_of)


def lsmdc_retrieval(root: str, split: str) -> Annotations:
    """LSMDC 2016: ``LSMDC16_annos_training.csv``, ``LSMDC16_challenge_1000_publictect.csv`` (tab; clip 0, sentence 5).

    The official reader takes the clip's name for its caption; the sentence stands in column 5.
    """
    (name,) = choose(split, {"train": ("annos_training",), "test": ("challenge_1000_publictect",)})
    rows = table(metadata(root, "lsmdc") / f"LSMDC16_{name}.csv", 6)
    return collect(rows, lambda row: Sample(row[0], lsmdc_clip(root, row[0]), (row[5],)))


def lsmdc_clip(root: str, clip: str) -> ClipSource:
    """``lsmdc/<movie>/<clip>.avi``; the movie is the clip's name before its time code."""
    movie = clip.rsplit("_", 1)[0] if "_" in clip else clip
    return video(root, "lsmdc", movie, f"{clip}.avi")


def didemo(root: str, split: str) -> Annotations:
    """DiDeMo, paragraph to video: ``DiDeMo_{train,val,test}.tsv`` (paragraph, file)."""
    rows = table(metadata(root, "didemo") / f"DiDeMo_{split}.tsv", 2)
    return collect(rows, lambda row: Sample(row[1], video(root, "didemo", "video", row[1]), (row[0],)))


def activitynet(root: str, split: str) -> Annotations:
    """ActivityNet Captions, paragraph to video: ``{train,val1,val2}.jsonl``; ``test`` is val1, ``val`` is val2."""
    (name,) = choose(split, {"train": ("train",), "test": ("val1",), "val": ("val2",)})

    def sample_of(record: dict[str, Any]) -> Sample:
        clip, caption = record["clip_name"], record["caption"]
        source = video(root, "activitynet", "activitynet_frames", clip, kind="frames")
        return Sample(clip, source, (caption if isinstance(caption, str) else " ".join(caption),))

    return collect(json_records(metadata(root, "activitynet") / f"{name}.jsonl"), sample_of)
