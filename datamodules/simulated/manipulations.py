"""Manipulated image-text pairs in DGM4's on-disk format, made from any set of captioned images.

Four manipulations under DGM4's names. ``face_swap`` pastes a region of another image over a region of this one,
``face_attribute`` turns the hue of a region, ``text_swap`` takes the caption of another image, ``text_attribute``
replaces words by others of their kind. Up to one of the image and one of the text are combined. The pairs are a pure
function of (seed, index), however many there are.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

from datamodules.readers.base import BadSample
from datamodules.readers.tar_shards import TarShards
from datamodules.simulated.scenes import GROUNDS, PATTERNS, Scene, make_scene, render
from datamodules.simulated.shapes import COLOURS, SHAPES
from datamodules.simulated.worlds import SPLIT_STARTS
from models.errors import UserError
from models.io import atomic_directory, stable_hash

WORLD = 1  # raise it when the same arguments would give other pairs

# How often each ``fake_cls`` occurs. DGM4's own shares, and even ones from which a small model learns all four kinds.
DGM4_SHARES = {
    "orig": 0.337, "face_swap": 0.213, "face_attribute": 0.18, "text_swap": 0.09, "text_attribute": 0.038,
    "face_swap&text_swap": 0.054, "face_swap&text_attribute": 0.023, "face_attribute&text_swap": 0.046,
    "face_attribute&text_attribute": 0.019,
}  # fmt: skip
EVEN_SHARES = {
    "orig": 0.30, "face_swap": 0.16, "face_attribute": 0.16, "text_swap": 0.10, "text_attribute": 0.10,
    "face_swap&text_swap": 0.045, "face_swap&text_attribute": 0.045, "face_attribute&text_swap": 0.045,
    "face_attribute&text_attribute": 0.045,
}  # fmt: skip
# Words that can stand for each other: a text attribute is changed by taking another one of the same group.
ATTRIBUTES = (
    (*COLOURS, *GROUNDS),
    tuple(SHAPES),
    PATTERNS,
    ("large", "medium", "small", "huge", "tiny"),
    ("left", "right"),
    ("top", "bottom"),
    ("old", "young"),
    ("happy", "sad", "angry", "calm"),
    ("man", "woman", "boy", "girl"),
    ("wins", "loses"), ("won", "lost"), ("celebrates", "mourns"), ("good", "bad"), ("best", "worst"), ("love", "hate"),
)  # fmt: skip
_ALTERNATIVES = {word: [w for w in group if w != word] for group in ATTRIBUTES for word in group}


class CaptionedImage(NamedTuple):
    """``boxes`` (x1, y1, x2, y2) in pixels are the regions that may be manipulated; empty: any region may."""

    image: Image.Image
    caption: str
    boxes: Sequence[tuple[int, int, int, int]] = ()


class Manipulated(NamedTuple):
    """``box`` (x1, y1, x2, y2) in pixels or empty; ``words``: manipulated words, counted between white space."""

    image: Image.Image
    caption: str
    kinds: tuple[str, ...]
    box: tuple[int, ...]
    words: tuple[int, ...]


# ------------------------------------------------------------------------------------------------------ manipulations


def manipulate(
    pair: CaptionedImage, donor: CaptionedImage, kinds: Sequence[str], rng: np.random.Generator, trace: int = 0
) -> Manipulated:
    """``pair`` with the manipulations ``kinds``; what they take from elsewhere they take from ``donor``.

    ``text_attribute`` becomes ``text_swap`` where the caption has no word of a group of ATTRIBUTES. ``trace``: see
    :func:`leave_trace`.
    """
    image, caption, done = pair.image.convert("RGB"), pair.caption, []
    box: Any = ()
    words: tuple[int, ...] = ()
    for kind in kinds:
        if kind in ("face_swap", "face_attribute"):
            box = _region(pair, rng)
            if kind == "face_swap":
                patch = donor.image.convert("RGB").crop(_region(donor, rng))
            else:
                patch = turn_hue(image.crop(box), int(rng.integers(64, 193)))
            image = paste_region(image, box, patch, trace)
        else:
            if kind == "text_attribute":
                caption, words = change_attributes(pair.caption, rng)
            if kind == "text_swap" or not words:
                kind = "text_swap"
                caption, words = swap_caption(pair.caption, donor.caption)
        done.append(kind)
    return Manipulated(image, caption, tuple(done), box, words)


def paste_region(image: Image.Image, box: tuple[int, int, int, int], patch: Image.Image, trace: int = 0) -> Image.Image:
    """``patch``, resized, over the region ``box``, its edges blended in."""
    patch = patch.resize((box[2] - box[0], box[3] - box[1]), Image.Resampling.BICUBIC)
    out = image.copy()
    out.paste(leave_trace(patch, trace), box[:2], _soft_mask(box))
    return out


def turn_hue(image: Image.Image, turn: int) -> Image.Image:
    """The colours turned by ``turn`` of 256 steps around the colour circle; greys stay grey."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(step + turn) % 256 for step in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def leave_trace(image: Image.Image, strength: int) -> Image.Image:
    """A lattice of single pixels, ``strength`` grey levels up and down: the kind of trace that the upsampling layers of image
    generators leave, by which detectors find what no seam gives away."""
    height, width = image.height, image.width
    lattice = np.where((np.arange(height)[:, None] + np.arange(width)) % 2, strength, -strength)[..., None]
    return Image.fromarray(np.clip(np.asarray(image).astype(np.int64) + lattice, 0, 255).astype(np.uint8))


def _soft_mask(box: tuple[int, int, int, int]) -> Image.Image:
    width, height = box[2] - box[0], box[3] - box[1]
    rim = max(1, min(width, height) // 12)
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (rim, rim, width - rim, height - rim))
    return mask.filter(ImageFilter.BoxBlur(rim / 2))


def swap_caption(original: str, donor: str) -> tuple[str, tuple[int, ...]]:
    """The donor's caption, and which of its words the original caption did not have."""
    known = {_plain(word) for word in original.split()}
    return donor, tuple(i for i, word in enumerate(donor.split()) if _plain(word) not in known)


def change_attributes(caption: str, rng: np.random.Generator) -> tuple[str, tuple[int, ...]]:
    """One or two words of ATTRIBUTES replaced by others of their group, and which; nothing where there is none."""
    words = caption.split()
    candidates = [i for i, word in enumerate(words) if _plain(word) in _ALTERNATIVES]
    if not candidates:
        return caption, ()
    chosen = rng.choice(candidates, min(len(candidates), int(rng.integers(1, 3))), replace=False)
    for i in chosen:
        word = _plain(words[i])
        words[i] = re.sub(re.escape(word), str(rng.choice(_ALTERNATIVES[word])), words[i], flags=re.IGNORECASE)
    return " ".join(words), tuple(sorted(int(i) for i in chosen))


def _plain(word: str) -> str:
    return re.sub(r"\W", "", word.lower())


def _region(pair: CaptionedImage, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """One of the pair's boxes or, without any, a region of a quarter to a half of each side."""
    if len(pair.boxes):
        x1, y1, x2, y2 = pair.boxes[int(rng.integers(len(pair.boxes)))]
        return x1, y1, x2, y2
    width, height = (max(4, int(side * rng.uniform(0.25, 0.5))) for side in pair.image.size)
    x, y = (
        int(rng.integers(0, max(whole - part, 0) + 1)) for whole, part in zip(pair.image.size, (width, height), strict=True)
    )
    return x, y, x + width, y + height


# ---------------------------------------------------------------------------------------------------------- writing


def write_split(
    folder: Path,
    split: str,
    count: int,
    source: Callable[[int], CaptionedImage],
    shares: Mapping[str, float],
    seed: int,
    name: str,
    trace: int,
) -> None:
    """``<folder>/DGM4/metadata/<split>.json`` with ``count`` pairs and their images.

    Args:
        source: captioned image number i of this split; number (i + something) is the donor.
        shares: of each ``fake_cls``; they need not sum to 1.
        name: of the corpus, a folder below ``DGM4/origin``.
        trace: see :func:`leave_trace`.
    """
    classes = list(shares)
    chances = np.array([shares[c] for c in classes]) / sum(shares.values())
    records = []
    for i in range(count):
        rng = np.random.default_rng((seed, list(SPLIT_STARTS).index(split), i))
        kinds = classes[rng.choice(len(classes), p=chances)].split("&")
        kinds = [] if kinds == ["orig"] else kinds
        pair = source(i)
        wants_donor = {"face_swap", "text_swap", "text_attribute"} & set(kinds) and count > 1
        donor = source((i + 1 + int(rng.integers(count - 1))) % count) if wants_donor else pair
        made = manipulate(pair, donor, kinds, rng, trace)
        image_kind = next((kind for kind in made.kinds if kind.startswith("face")), None)
        if image_kind:
            path = f"DGM4/manipulation/{image_kind}/{split}-{i:06d}-{image_kind}.jpg"
        else:
            path = f"DGM4/origin/{name}/{split}/{i // 1000:04d}/{i % 1000}.jpg"
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        made.image.save(file, "JPEG", quality=92)
        records.append(
            {
                "id": SPLIT_STARTS[split] + i,
                "image": path,
                "text": made.caption,
                "fake_cls": "&".join(made.kinds) or "orig",
                "fake_image_box": list(made.box),
                "fake_text_pos": list(made.words),
                "mtcnn_boxes": [list(box) for box in pair.boxes],
            }
        )
    metadata = folder / "DGM4" / "metadata"
    metadata.mkdir(parents=True, exist_ok=True)
    (metadata / f"{split}.json").write_text(json.dumps(records))


def manipulated_scenes(
    root: str,
    train: int = 6000,
    val: int = 500,
    test: int = 1000,
    image_size: int = 64,
    shares: Mapping[str, float] | None = None,
    trace: int = 32,
    seed: int = 0,
) -> Path:
    """A folder in DGM4's format made from simulated scenes, written unless it is there already.

    Args:
        train, val, test: number of pairs; a split of 0 is left out.
        image_size: side of the square JPEGs in pixels.
        shares: of each ``fake_cls`` (default: EVEN_SHARES).
        trace: what the manipulation leaves in a region, see :func:`leave_trace`.
        seed: of the scenes and of their manipulation.
    """
    sizes = {"train": train, "val": val, "test": test}
    shares = dict(shares or EVEN_SHARES)
    folder = Path(root, f"manipulated_scenes_{stable_hash([WORLD, sizes, image_size, shares, trace, seed])}")
    if not folder.is_dir():
        with atomic_directory(folder, sync=False) as temporary:
            for split, count in sizes.items():
                start = SPLIT_STARTS[split]
                if count:
                    scene = lambda i, start=start: captioned_scene(make_scene(seed, start + i), image_size)  # noqa: E731
                    write_split(temporary, split, count, scene, shares, seed, "scenes", trace)
    return folder


def captioned_scene(scene: Scene, size: int) -> CaptionedImage:
    """The scene with a caption that a mirror leaves true, and the box of its main thing."""
    main, *others = scene.things
    parts = [f"a {'large' if main.radius > 0.235 else 'medium'} {main.name}", *(f"a small {thing.name}" for thing in others)]
    caption = f"{' and '.join(parts)} on a {scene.pattern} {scene.ground} background"
    corners = (main.x - main.radius, main.y - main.radius, main.x + main.radius, main.y + main.radius)
    x1, y1, x2, y2 = (int(np.clip(round(value * size), 0, size)) for value in corners)
    return CaptionedImage(render(scene, size), caption, [(x1, y1, x2, y2)])


def manipulated_pairs(root: str, pairs: str, shares: Mapping[str, float] | None = None, trace: int = 0, seed: int = 0) -> Path:
    """A folder in DGM4's format made from your own captioned images, written unless it is there already.

    Args:
        root: the new folder is made in here.
        pairs: folder of img2dataset-style tar shards (``train/``, ``val/``, ``test/``); the first caption counts.
        shares: of each ``fake_cls`` (default: DGM4_SHARES).
        trace: what the manipulation leaves in a region, see :func:`leave_trace`.
    """
    shares = dict(shares or DGM4_SHARES)
    splits = {split: TarShards(pairs, split=split) for split in SPLIT_STARTS if Path(pairs, split).is_dir()}
    if not splits:
        raise UserError(f"datamodule.simulate.pairs: {pairs} has no folder train, val or test with tar shards.")
    prints = {split: data.fingerprint for split, data in splits.items()}
    folder = Path(root, f"manipulated_pairs_{stable_hash([WORLD, prints, shares, trace, seed])}")
    if not folder.is_dir():
        with atomic_directory(folder, sync=False) as temporary:
            for split, data in splits.items():
                rows = [i for i in range(len(data)) if _is_readable(data, i)]
                read = lambda i, d=data, r=rows: CaptionedImage(d.image(r[i]), d.captions(r[i])[0])  # noqa: E731
                write_split(temporary, split, len(rows), read, shares, seed, "pairs", trace)
    return folder


def _is_readable(data: TarShards, row: int) -> bool:
    with contextlib.suppress(BadSample):
        data.image(row)
        return True
    return False
