"""Official annotation formats of captioned clips: pre-training and text-video retrieval.

Every reader is a function ``(root, split) -> Annotations``; split is train, val or test, and a data set without an own file
for one of them raises MissingSplit.
"""

from __future__ import annotations

from pathlib import Path

from datamodules.readers.clips import Media
from datamodules.readers.video_annotations.sample import (
    AnnotationError,
    Annotations,
    Sample,
    choose,
    existing,
    field,
    json_file,
    json_lines,
    metadata,
    plain_pickle,
    table,
)


def webvid(root: str, split: str) -> Annotations:
    """WebVid-2M: ``webvid_{training,validation}_success_full.tsv`` (caption, path without suffix)."""
    part, folder = choose(split, {"train": ("training", "train"), "val": ("validation", "val")})
    path = metadata(root, "webvid") / f"webvid_{part}_success_full.tsv"
    rows = table(path, 2, header=True)
    return Annotations([Sample(r[1], Media(str(Path(root, "webvid", folder, f"{r[1]}.mp4"))), (r[0],)) for r in rows])


def cc3m(root: str, split: str) -> Annotations:
    """CC3M: ``cc3m_{training,validation}_success_full.tsv`` (caption, file)."""
    (part,) = choose(split, {"train": ("training",), "val": ("validation",)})
    rows = table(metadata(root, "cc3m") / f"cc3m_{part}_success_full.tsv", 2, header=True)
    return Annotations([Sample(r[1], Media(str(Path(root, "cc3m", part, r[1])), "image"), (r[0],)) for r in rows])


def cc12m(root: str, split: str) -> Annotations:
    """CC12M: ``{train,val,test}.tsv`` (caption, path of which the last part counts)."""
    rows = table(metadata(root, "cc12m") / f"{split}.tsv", 2, header=True)
    images = [(r[0], Path(r[1]).name) for r in rows]
    return Annotations([Sample(name, Media(str(Path(root, "cc12m", name)), "image"), (text,)) for text, name in images])


def msrvtt_retrieval(root: str, split: str) -> Annotations:
    """MSR-VTT 9k/1k ("jsfusion"): every caption of a training clip, the one listed caption of a test clip."""
    (listed,) = choose(split, {"train": ("train",), "test": ("val",)})
    base = Path(root, "msrvtt")
    captions: dict[str, list[str]] = {}
    source = base / "annotation" / "MSR_VTT.json"
    for entry in field(json_file(source), "annotations", source):
        captions.setdefault(field(entry, "image_id", source), []).append(field(entry, "caption", source))
    lists = base / "high-quality" / "structured-symlinks"
    names = existing(lists / f"{listed}_list_jsfusion.txt").read_text().split()
    chosen = plain_pickle(lists / "jsfusion_val_caption_idx.pkl") if split == "test" else {}
    samples = []
    for name in names:
        if name not in captions:
            raise AnnotationError(f"{source} has no caption of {name}, which {listed}_list_jsfusion.txt lists")
        texts = (captions[name][chosen[name]],) if split == "test" else tuple(captions[name])
        samples.append(Sample(name, Media(str(base / "videos" / "all" / f"{name}.mp4")), texts))
    return Annotations(samples)


def msvd_retrieval(root: str, split: str) -> Annotations:
    """MSVD: ``MSVD_{train,test}.tsv`` (captions joined by commas, name). The format cuts sentences that hold commas."""
    choose(split, {"train": (), "test": ()})
    rows = table(metadata(root, "msvd") / f"MSVD_{split}.tsv", 2, header=False)
    samples = []
    for captions, name in (row[:2] for row in rows):
        texts = tuple(text.strip() for text in captions.split(",") if text.strip())
        samples.append(Sample(name, Media(str(Path(root, "msvd", "YouTubeClips", _with_suffix(name, ".avi")))), texts))
    return Annotations(samples)


def lsmdc_retrieval(root: str, split: str) -> Annotations:
    """LSMDC 2016: ``LSMDC16_annos_training.csv``, ``LSMDC16_challenge_1000_publictect.csv`` (tab; clip 0, sentence 5).

    The official reader takes the clip's name for its caption; the sentence stands in column 5.
    """
    (name,) = choose(split, {"train": ("annos_training",), "test": ("challenge_1000_publictect",)})
    rows = table(metadata(root, "lsmdc") / f"LSMDC16_{name}.csv", 6)
    return Annotations([Sample(r[0], lsmdc_clip(root, r[0]), (r[5],)) for r in rows])


def lsmdc_clip(root: str, clip: str) -> Media:
    """``lsmdc/<movie>/<clip>.avi``; the movie is the clip's name before its time code."""
    movie = clip.rsplit("_", 1)[0] if "_" in clip else clip
    return Media(str(Path(root, "lsmdc", movie, f"{clip}.avi")))


def didemo(root: str, split: str) -> Annotations:
    """DiDeMo, paragraph to video: ``DiDeMo_{train,val,test}.tsv`` (paragraph, file)."""
    rows = table(metadata(root, "didemo") / f"DiDeMo_{split}.tsv", 2, header=False)
    return Annotations([Sample(r[1], Media(str(Path(root, "didemo", "video", r[1]))), (r[0],)) for r in rows])


def activitynet(root: str, split: str) -> Annotations:
    """ActivityNet Captions, paragraph to video: ``{train,val1,val2}.jsonl``; ``test`` is val1, ``val`` is val2."""
    (name,) = choose(split, {"train": ("train",), "test": ("val1",), "val": ("val2",)})
    path = metadata(root, "activitynet") / f"{name}.jsonl"
    samples = []
    for record in json_lines(path):
        clip, caption = field(record, "clip_name", path), field(record, "caption", path)
        folder = str(Path(root, "activitynet", "activitynet_frames", clip))
        samples.append(Sample(clip, Media(folder, "frames"), (caption if isinstance(caption, str) else " ".join(caption),)))
    return Annotations(samples)


def _with_suffix(name: str, suffix: str) -> str:
    return name if Path(name).suffix in (".avi", ".mp4", ".webm") else name + suffix
