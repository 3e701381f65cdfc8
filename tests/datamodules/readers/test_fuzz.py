"""Damaged files, some hundred for each reader: every one is read, skipped or refused with a message, in bounded time."""

import csv
import json
import signal
import tarfile
import wave
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.dgm4 import DGM4
from datamodules.order import BatchRequest
from datamodules.readers import benchmarks, driving, formats, video_lists
from datamodules.readers.base import BadSample
from datamodules.readers.clip import ClipSource, read_clip
from datamodules.readers.images import open_rgb
from datamodules.readers.sail_chunks import SailChunks
from datamodules.readers.sound import read_sound
from datamodules.readers.tar_shards import TarShards
from datamodules.readers.video import write_mp4
from datamodules.readers.video_annotations import narrated, questions, stills
from datamodules.readers.video_annotations.sample import MissingSplit
from datamodules.readers.video_annotations.shards import clip_shards
from datamodules.readers.voc import VocSegmentation, voc_palette
from datamodules.streaming import stream_samples
from datamodules.tokenizers.base import load_tokenizer
from datamodules.tokenizers.word_labels import CaptionTokenizer
from models.bev_fusion.geometry import BevGrid
from models.errors import UserError
from tests.datamodules.conftest import image_bytes, sample_files, write_tar
from tests.datamodules.readers import layouts
from tests.datamodules.readers.test_video_annotations import FORMATS, write

pytestmark = pytest.mark.slow
MUTANTS, SECONDS = 150, 20
JSON_VALUES = (
    "null", "true", "7", "-1", "1e400", "NaN", str(2**70), '"\\ud83d"', '"../../x"', '"/etc/passwd"', '"a\\u0000b"', '""',
    "[]", "{}", "[[1]]", '"' + "x" * 400 + '"',
)  # fmt: skip


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One random damage: cut, flipped bits, zeros, a piece twice, a piece gone, garbage, a mark, another JSON value."""
    data = bytearray(data)
    place, size = int(rng.integers(len(data) + 1)), int(rng.integers(1, 64))
    kind = int(rng.integers(9))
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        for at in rng.integers(0, max(len(data), 1), size).tolist():
            data[at : at + 1] = bytes([data[at] ^ (1 << int(rng.integers(8)))]) if at < len(data) else b""
    elif kind == 2:
        data[place : place + size] = b"\0" * size
    elif kind == 3:
        data[place:place] = data[place : place + 10 * size]
    elif kind == 4:
        del data[place : place + size]
    elif kind == 5:
        data[place:place] = rng.bytes(size)
    elif kind == 6:
        data[:0] = b"\xef\xbb\xbf"
    else:  # where the file is text: a value, or a number, gives way to another
        marks = [i for i, byte in enumerate(data) if byte in b':,\t ;[{"' or chr(byte).isdigit()][:5000]
        if marks:
            start = marks[int(rng.integers(len(marks)))] + 1
            end = start
            while end < min(len(data), start + 200) and data[end] not in b",}]\t\n;":
                end += 1
            data[start:end] = str(rng.choice(JSON_VALUES)).encode()
    return bytes(data)


def tars(root):
    files = {k: v for n in range(3) for k, v in sample_files(n, label=n).items()}
    write_tar(
        root / "0.tar", {**files, "long" * 40 + ".jpg": image_bytes(5), "long" * 40 + ".txt": b"words"}, tarfile.PAX_FORMAT
    )


def read_tars(root):
    read_images(TarShards(str(root)))
    for sample in stream_samples(str(root / "0.tar"), ("caption",)):
        str(sample)


def read_images(data):
    for i in range(len(data)):
        data.key(i).encode()
        "".join(data.captions(i)).encode()
        data.labels[i]
        try:
            data.image(i)
        except BadSample:
            pass
    assert data.fingerprint


def clip_tars(root):
    write_mp4(root / "v.mp4", np.zeros((6, 32, 32, 3), np.uint8), fps=6)
    clip = (root / "v.mp4").read_bytes()
    (root / "v.mp4").unlink()
    write_tar(root / "train" / "0.tar", {"a.mp4": clip, "a.txt": b"words", "b.mp4": clip, "b.json": b'{"caption": "c"}'})


def read_clip_tars(root):
    read_samples(clip_shards(str(root), "train"), 2)


def read_samples(annotations, clips=0):
    for entry in annotations.skipped:
        str(entry).encode("utf-8", "surrogatepass")
    for sample in annotations.samples[:20]:
        "".join(sample.texts).encode()
        try:
            text, source = sample.draw(np.random.default_rng(0))
            text.encode()
            if clips:
                read_clip(source, np.arange)
        except BadSample:
            pass


def dgm4(root):
    records = []
    for n in range(4):
        layouts.picture(root / f"DGM4/{n}.jpg", n)
        record = {"id": n, "image": f"DGM4/{n}.jpg", "text": "red star", "fake_cls": "face_swap&text_swap"}
        records.append(record | {"fake_image_box": [1, 2, 9, 9], "fake_text_pos": [0]})
    (root / "train.json").write_text(json.dumps(records))
    (root / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nred\nstar\n")


def read_dgm4(root):
    data = DGM4(root, root / "train.json", CaptionTokenizer(str(root / "vocab.txt")), 8, training=True)
    if len(data):
        data[BatchRequest(np.arange(len(data)), 0, 0)]


def chunks(root):
    layouts.chunks(root / "v", torch.randn(6, 4), 4)
    layouts.chunks(root / "t", torch.randn(6, 3), 4)


def read_chunks(root):
    data = SailChunks([str(root / "v")], [str(root / "t")])
    data.encoded("text", np.arange(len(data)))


def recordings(root):
    for name in ("calibration", "images", "labels", "ultrasonic", "splits"):
        (root / name).mkdir()
    (root / "meta.csv").write_text("id,rig,scene,indoor,light,weather,temperature_c\na,r,s,0,day,clear,20\n")
    (root / "splits" / "train.txt").write_text("a\n")
    camera = driving.camera_to_json(__import__("datamodules.simulated.driving.camera", fromlist=["x"]).make_camera(32, 24))
    sensors = {"positions": [[-3.8, 0.2, 0.5]], "yaw": [3.1], "az_half_deg": 30, "az_max_deg": 70, "full_scale": 255}
    (root / "calibration" / "r.json").write_text(json.dumps({**camera, "ultrasonic": sensors}))
    Image.new("RGB", (32, 24)).save(root / "images" / "a.png")
    Image.new("L", (4, 4)).save(root / "labels" / "a.png")
    np.savez(root / "ultrasonic" / "a.npz", traces=np.ones((1, 64), np.uint8), pairs=[[0, 0]], sample_rate=16000.0)


def read_recordings(root):
    meta, splits = driving.read_meta(root), driving.read_splits(root)
    for key in splits["train"]:
        if key not in meta:
            continue
        rig = driving.read_rig(root, meta[key].rig)
        for read in (
            lambda key=key: driving.read_image(root, key),
            lambda key=key: driving.read_label(root, key, BevGrid(4, 4, 0.5, -3.8), 2),
            lambda key=key, rig=rig: rig.ultrasonic and driving.read_echoes(root, key, rig.ultrasonic, 64),
        ):
            try:
                read()
            except BadSample:
                pass


def lists(root):
    (root / "actnet_train_split.txt").write_text("v_a,30,1,0\nv_b,30,2\nx/y,9,1\n")
    (root / "train.txt").write_text("clip;1;180;0\nother;31;60;1\n")
    (root / "mini_train_videofolder.txt").write_text("riding a bike/abc 30 4\n")
    (root / "classInd.txt").write_text("one\ntwo\n")


def read_lists(root):
    for layout in ("activitynet", "kinetics_sounds", "mini_kinetics"):
        files = video_lists.LAYOUTS[layout]
        try:
            rows = video_lists.read_list(root / files.lists["train"], layout)
        except UserError as error:
            assert "line" in str(error) or "cannot be read" in str(error) or "UTF" in str(error)
            continue
        video_lists.padded_labels(rows)
        video_lists.read_classes(root, layout)
        for row in rows:
            try:
                video_lists.locate(root, files, row, 25.0)
            except BadSample:
                pass


def voc(root):
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "JPEGImages" / "a.jpg")
    mask = Image.new("P", (8, 8))
    mask.putpalette(voc_palette().tobytes())
    mask.save(root / "SegmentationClass" / "a.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("a\n")


def read_voc(root):
    data = VocSegmentation(root)
    [data[i] for i in range(len(data))]


def winoground(root):
    row = {"id": 0, "caption_0": "a", "caption_1": "b", "image_0": "x", "image_1": "y"}
    (root / "examples.jsonl").write_text(json.dumps(row) + "\n")
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for name in "xy":
            archive.writestr(f"images/{name}.png", image_bytes(1, form="PNG"))


def read_winoground(root):
    for example in benchmarks.read_winoground(str(root)):
        [load() for load in example.images]


def mmvp(root):
    for number in (1, 2):
        layouts.picture(root / "MLLM_VLM Images" / "Color" / f"{number}.jpg", number)
    with open(root / "Questions.csv", "w", newline="") as file:
        csv.writer(file).writerows([["Question ID", "Type", "Statement"], [1, "Color", "a"], [2, "Color", "b"]])


def read_mmvp(root):
    list(benchmarks.each_image([image for pair in benchmarks.read_mmvp(str(root)) for image in pair.images]))


def images(root):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    for form in ("jpeg", "png", "gif", "webp", "tiff", "bmp"):
        image.save(root / f"x.{form}")
    image.convert("P").save(root / "p.png", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(root / "turned.jpg", exif=exif)


def read_all_images(root):
    for file in root.iterdir():
        for official in (False, True):
            try:
                open_rgb(file, official)
            except BadSample:
                pass


def videos(root):
    from tests.datamodules.readers import test_clip

    for suffix, codec in (("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4"), ("ts", "libx264")):
        test_clip.write(root / f"x.{suffix}", test_clip.grey(12), codec=codec, sound_at=0.0 if suffix != "avi" else None)
    with wave.open(str(root / "x.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 4000, "NONE", ""))
        file.writeframes(b"\1\2" * 4000)


def read_videos(root):
    for file in root.iterdir():
        try:
            if file.suffix == ".wav":
                read_sound(file, 16000)
            else:
                read_clip(ClipSource(str(file)), lambda count: np.array([count - 1, count // 2]), 16000)
        except BadSample:
            pass


def arrow(root):
    import pyarrow as pa

    table = pa.table({"image": [image_bytes(1), image_bytes(2)], "caption": [["a", "b"], ["c"]], "image_id": [7, 8]})
    (root / "vg").mkdir()
    with pa.OSFile(str(root / "vg" / "vg.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def read_arrow(root):
    from datamodules.readers.arrow import open_table

    open_table.cache_clear()
    read_samples(stills.visual_genome(str(root), "train"), clips=1)


def vcr(root):
    record = {
        "objects": ["person", "dog"], "img_fn": "m/a.jpg", "metadata_fn": "m/a.json", "question": ["Why", [0, 1], "?"],
        "answer_choices": [["It", [1]]] * 4, "rationale_choices": [["so"]] * 4, "answer_label": 3, "rationale_label": 1,
    }  # fmt: skip
    boxes = {"boxes": [[0, 0, 4, 4, 0.9], [5, 5, 9, 9, 0.9]]}
    write(root, {"meta_data/vcr1annots/val.jsonl": json.dumps(record), "vcr/vcr1images/m/a.json": json.dumps(boxes)})


def narrations(root):
    spoken = {"info": {"duration": 60}, "subtitles": [{"word": "so", "time": 1}], "denoised": [{"cleanasr": "So, we"}]}
    write(root, {
        "meta_data/howto100m/ht100_videos_split.csv": "Name\tx\nfood/v1.webm\t0",
        "howto100m/howto100m_csv/v1.csv": "start,end,text\n10,11,cut it\n20,40,stir it",
        "meta_data/yttemporal/val_success.csv": "Name\nsubset_1/data/v.mp4",
        "yttemporal/videos/subset_1/annotations/v.json": json.dumps(spoken),
    })  # fmt: skip


def read_narrations(root):
    for read in (lambda: narrated.howto100m(str(root), "train"), lambda: narrated.yttemporal(str(root), "val")):
        try:
            read_samples(read())
        except UserError:
            pass


READERS = {
    "tar_shards": (tars, read_tars),
    "clip_shards": (clip_tars, read_clip_tars),
    "dgm4": (dgm4, read_dgm4),
    "sail_chunks": (chunks, read_chunks),
    "driving": (recordings, read_recordings),
    "video_lists": (lists, read_lists),
    "voc": (voc, read_voc),
    "winoground": (winoground, read_winoground),
    "mmvp": (mmvp, read_mmvp),
    "images": (images, read_all_images),
    "videos": (videos, read_videos),
    "arrow": (arrow, read_arrow),
    "vcr": (vcr, lambda root: read_samples(questions.vcr(str(root), "val"))),
    "narrated": (narrations, read_narrations),
    "coco": (
        lambda root: layouts.coco_captions(root, 3, 1),
        lambda root: read_images(
            formats.coco_captions(str(root / "annotations/captions_train2017.json"), str(root / "train2017"))
        ),
    ),
    "karpathy": (
        layouts.karpathy_flickr30k,
        lambda root: read_images(formats.karpathy(str(root / "dataset_flickr30k.json"), str(root / "flickr30k-images"))),
    ),
    "csv": (
        layouts.csv_captions,
        lambda root: read_images(formats.table(str(root / "captions.csv"), str(root), "path", "caption", label="id")),
    ),
    "parquet": (
        layouts.parquet_captions,
        lambda root: read_images(formats.parquet(str(root / "captions.parquet"), str(root), "path", "caption")),
    ),
    "json_list": (
        layouts.json_captions,
        lambda root: read_images(formats.json_list(str(root / "captions.json"), str(root))),
    ),
}  # fmt: skip


def survive(root, originals, read, mutants, seed=0):
    """Damage one file after the other; whatever is raised must be meant for the user."""
    rng = np.random.default_rng(seed)
    annotations = [name for name in originals if not name.endswith((".jpg", ".JPEG"))] or list(originals)

    def late(*_):
        raise AssertionError(f"mutant {number} of {name} is still being read after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    try:
        for number in range(mutants):
            name = annotations[number % len(annotations)]
            (root / name).write_bytes(mutated(originals[name], rng))
            signal.alarm(SECONDS)
            try:
                read(root)
            except (UserError, MissingSplit) as error:
                assert str(error)
            except Exception as error:
                raise AssertionError(f"mutant {number} of {name}: {error!r}") from error
            finally:
                signal.alarm(0)
                (root / name).write_bytes(originals[name])
    finally:
        signal.signal(signal.SIGALRM, before)


def files_of(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", READERS)
def test_damaged_files(tmp_path, name):
    make, read = READERS[name]
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    read(root)  # whole files are read
    survive(root, files_of(root), read, MUTANTS)


@pytest.mark.parametrize("reader, split, files", [f[:3] for f in FORMATS], ids=[f"{f[0].__name__}-{f[1]}" for f in FORMATS])
def test_damaged_annotations(tmp_path, reader, split, files):
    write(tmp_path, files)
    survive(tmp_path, files_of(tmp_path), lambda root: read_samples(reader(str(root), split)), 60)


def test_damaged_vocabularies(tmp_path):
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    pieces = ["<s>", "<pad>", "</s>", "<unk>", *bytes_to_unicode().values(), "Ġa", "<mask>"]
    pieces = {piece: number for number, piece in enumerate(pieces)}
    write(tmp_path, {"a/vocab.txt": "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat", "b/vocab.json": json.dumps(pieces)})
    write(tmp_path, {"b/merges.txt": "#version: 0.2\nĠ a"})

    def read(root):
        for folder in "ab":
            try:
                load_tokenizer(str(root / folder), "x")(["a cat"])
            except UserError:
                pass

    survive(tmp_path, files_of(tmp_path), read, 60)
