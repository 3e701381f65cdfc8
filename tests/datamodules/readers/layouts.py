"""Small datasets of exactly the published layouts: one function per YAML under conf/datamodule."""

from __future__ import annotations

import csv
import json
import zlib
from pathlib import Path

import torch

from tests.datamodules.conftest import image_bytes


def picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image_bytes(seed))


def coco_captions(root: Path, train: int = 40, test: int = 8) -> None:
    for split, count in (("train2017", train), ("val2017", test)):
        names = {i: f"{1000 - i:012d}.jpg" for i in range(count)}
        for i, name in names.items():
            picture(root / split / name, i)
        # As published, annotations of an image do not stand together.
        notes = [{"id": i * 10 + j, "image_id": i, "caption": f"caption {j} of {i}\n"} for j in range(2) for i in range(count)]
        images = [{"id": i, "file_name": name, "height": 24, "width": 24, "license": 1} for i, name in names.items()]
        (root / "annotations").mkdir(exist_ok=True)
        content = {"info": {}, "licenses": [], "images": images, "annotations": notes}
        (root / "annotations" / f"captions_{split}.json").write_text(json.dumps(content))


def _karpathy(root: Path, file: str, folders: dict[str, str | None], prefix: str) -> None:
    images = []
    for number in range(40):
        split = list(folders)[number % len(folders)]
        name = f"{number:06d}.jpg"
        picture(root / prefix / (folders[split] or "") / name, number)
        sentences = [{"raw": f"caption {j} of {number}", "tokens": [], "imgid": number, "sentid": j} for j in range(2)]
        entry = {"filename": name, "imgid": number, "split": split, "sentences": sentences, "sentids": [0, 1]}
        images.append(entry | ({"filepath": folders[split], "cocoid": number} if folders[split] else {}))
    (root / file).write_text(json.dumps({"images": images, "dataset": file}))


def karpathy(root: Path) -> None:
    folders = {"train": "train2014", "restval": "val2014", "val": "val2014", "test": "val2014"}
    _karpathy(root, "dataset_coco.json", folders, "")


def karpathy_flickr30k(root: Path) -> None:
    _karpathy(root, "dataset_flickr30k.json", dict.fromkeys(("train", "val", "test")), "flickr30k-images")


def _conceptual(root: Path, file: str, folder: str, rows: int, url_first: bool) -> None:
    lines = []
    for number in range(rows):
        url, caption = f"http://example.org/{number}.jpg", f'a "caption {number}'  # a lone quote, as there are many
        lines.append("\t".join((url, caption) if url_first else (caption, url)))
        if number % 4 != 3:  # the rest could not be downloaded
            picture(root / folder / f"{number}_{zlib.crc32(url.encode())}", number)
    root.mkdir(parents=True, exist_ok=True)
    (root / file).write_text("\n".join(lines) + "\n")


def cc_tsv(root: Path) -> None:
    _conceptual(root, "Train_GCC-training.tsv", "training", 60, url_first=False)
    _conceptual(root, "Validation_GCC-1.1.0-Validation.tsv", "validation", 12, url_first=False)


def cc12m_tsv(root: Path) -> None:
    _conceptual(root, "cc12m.tsv", "training", 80, url_first=True)


def _rows(root: Path, count: int = 60) -> list[dict[str, str]]:
    for number in range(count):
        picture(root / "images" / f"{number}.jpg", number)
    return [{"id": str(n), "path": f"images/{n}.jpg", "caption": f"caption {n}, in two\nlines"} for n in range(count)]


def csv_captions(root: Path) -> None:
    rows = _rows(root)
    with open(root / "captions.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parquet_captions(root: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{**row, "caption": [row["caption"], "another"]} for row in _rows(root)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), root / "captions.parquet", row_group_size=7)


def json_captions(root: Path) -> None:
    rows = [{"image": row["path"], "caption": row["caption"]} for row in _rows(root)]
    for n in range(0, len(rows), 2):
        said = [{"from": "human", "value": "Describe it."}, {"from": "gpt", "value": f"<image>long caption {n}"}]
        rows[n] = {"image": rows[n]["image"], "conversations": said}
    (root / "captions.json").write_text(json.dumps(rows))


KINDS = ("raw_caption", "shortIB_captions", "longIB_captions", "shortSV_captions", "longSV_captions", "shortLLA_captions")


def _sail(root: Path, name: str, count: int) -> None:
    header = ["Image Url", *KINDS, "longLLA_captions", "Image Path"]
    (root / name).mkdir(parents=True, exist_ok=True)
    with open(root / f"{name}_3long_3short_1raw_captions_url_filtered.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for n in range(count):
            path = f"{name}/images/{n // 10000:07d}/{n % 10000:07d}.jpg"
            picture(root / path, n)
            writer.writerow([f"http://x/{n}", *(f"{kind} of {name} {n}, long" for kind in header[1:-1]), path])


def sail_csv(root: Path) -> None:
    _sail(root, "cc3m", 400)


def sail_csv_23m(root: Path) -> None:
    for name, count in (("yfcc15m", 1500), ("cc3m", 1500), ("cc12m", 1500)):
        _sail(root, name, count)


def chunks(folder: Path, values: torch.Tensor, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, chunk in enumerate(values.half().split(size)):
        torch.save(chunk.clone(), folder / f"{number}.pt")


def sail_chunks(root: Path, count: int = 500, size: int = 32) -> None:
    torch.manual_seed(0)
    chunks(root / "image_embedding/dinov2-large/dreamclipcc3m_concat", torch.randn(count, 12), size)
    for column in ("raw_caption", "longSV_captions"):
        chunks(root / f"text_embedding/gte-large-en-v1.5/dreamclipcc3m_{column}", torch.randn(count, 8), size)


def class_folders(root: Path) -> None:
    for split, count in (("train", 20), ("test", 4)):
        for number, name in enumerate(("golden_retriever", "cat", "Bird")):
            for i in range(count):
                picture(root / split / name / f"{i}.JPEG", number * 100 + i)


LAYOUTS = {
    make.__name__: make
    for make in (
        coco_captions, karpathy, karpathy_flickr30k, cc_tsv, cc12m_tsv, csv_captions, parquet_captions, json_captions,
        sail_csv, sail_csv_23m, sail_chunks, class_folders,
    )
}  # fmt: skip
