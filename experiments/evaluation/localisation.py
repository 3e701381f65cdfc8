"""Training-free localisation of class names in images (freeze-align, arXiv 2409.19425)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from datamodules.readers.voc import VocSegmentation
from experiments.evaluation.base import EmbeddedSplit, SuiteResult
from experiments.figures import alignment
from models.encoders.preprocess import ImagePreprocess
from models.errors import UserError
from models.freeze_align.localisation import LocalisationMeter, classes_in, outline
from models.io import stable_hash

BASELINES = ("name of another class", "random map", "whole image", "centre box")


def localisation(
    split: EmbeddedSplit,
    root: str | None = None,
    simulate: Callable[[str], Path] | None = None,
    classes_file: str | None = None,
    threshold: float = 0.4,
    size: int = 256,
    image_size: int | None = None,
    batch_size: int = 32,
    limit: int | None = None,
    examples: int = 5,
) -> SuiteResult:
    """Intersection over union, in percent, of the patches that resemble the names of the classes in an image.

    Each projected patch is multiplied, as it is, with the normalised embedding of the bare name; the map is enlarged to
    ``size``, scaled to [0, 1] and cut at ``threshold``. Only classes that the mask holds are judged. Beside it: the same maps
    read with the name of a class that is not there (what the name adds to seeing that there is something), maps of noise, the
    whole image, and the box of its middle half by half.

    Args:
        root: Pascal VOC's layout, split val, see :class:`~datamodules.readers.voc.VocSegmentation`.
        simulate: writes a set of that layout, ``simulate(root) -> folder``, used where ``root`` holds none itself.
        classes_file: see there.
        threshold: of the scaled map.
        size: pixels per side at which masks are compared; the mask is resized to it by nearest neighbours.
        image_size: pixels per side of the images, squashed to a square; None: as in training. More of them make a finer grid
            of patches; convolution nets and the hub's DINOv2 take any.
        batch_size: images per forward pass.
        limit: first images only.
        examples: how many images are drawn.

    Left out with a note without ``root``, for a head that has no projector of single patches, and where the set would be
    simulated in a run on data that is not.
    """
    if root is None:
        return SuiteResult(notes=["localisation left out: give Pascal VOC's folder, evaluation.localisation.root=DIR."])
    head = split.encoders.head
    if not getattr(head, "takes_tokens", False) or head.local_vision is None:
        return SuiteResult(notes=["localisation left out: this head projects no single patches."])
    if simulate is not None and not (Path(root) / "JPEGImages").is_dir():
        if not split.simulated:
            return SuiteResult(
                notes=[
                    "localisation left out: its images would be simulated, and the data of this run is not. Give Pascal VOC's "
                    "folder, evaluation.localisation.root=DIR."
                ]
            )
        root = str(simulate(root))
    data = VocSegmentation(root, classes_file=classes_file)
    names = F.normalize(split.encode_text(data.class_names), dim=-1)
    count = min(len(data), limit or len(data))
    meter, others = LocalisationMeter(threshold), {name: LocalisationMeter(threshold) for name in BASELINES}
    # The whole image, whatever its shape: a crop would lose what the mask still has.
    preprocess = split.encoders.preprocess.resized(image_size, None, squash=True)
    shown: list[Any] = []
    for i, (image, labels, patches) in enumerate(_patches(split, data, range(count), preprocess, size, batch_size)):
        maps = (patches @ names.T).permute(2, 0, 1)
        meter.add(maps, labels)
        _add_baselines(others, maps, labels, seed=i)
        if len(shown) < examples and classes_in(labels):
            shown.append(_example(image, labels, maps, data.class_names, threshold))
    if not meter.images:
        raise UserError(f"none of the {count} masks of {data.root} holds a class: there is nothing to find.")
    hashes = {
        **split.hashes,
        "prompts": stable_hash(data.class_names),
        "split": stable_hash([data.split, data.names[:count]]),
        "preprocessing": stable_hash([preprocess.identity(), threshold, size]),
    }
    notes = [] if count == len(data) else [f"localisation: the first {count} of {len(data)} images only."]
    return SuiteResult(
        metrics=_named(meter),
        baselines={name: _named(other) for name, other in others.items()},
        hashes=hashes,
        notes=notes,
        figures={"localisation": partial(alignment.localisation, shown)},
    )


def _named(meter: LocalisationMeter) -> dict[str, float]:
    result = meter.result()
    return {"localisation/image_iou": result.per_image, "localisation/class_iou": result.per_class}


def _patches(
    split: EmbeddedSplit, data: VocSegmentation, rows: range, preprocess: ImagePreprocess, size: int, batch_size: int
) -> Iterator[tuple[Image.Image, Tensor, Tensor]]:
    """Each image, its labels (size, size) and its projected patches (h, w, E), on the CPU."""
    encoders = split.encoders
    for start in range(0, len(rows), batch_size):
        read = [data[i] for i in rows[start : start + batch_size]]
        pixels = torch.stack([preprocess(image) for image, _ in read]).to(encoders.device)
        tokens = encoders.vision(pixels).tokens
        # What precedes the patches: CLS and registers; of a convolution net the pooled vector, which the head takes for CLS.
        prefix = max(encoders.vision.prefix, 1)
        patches = encoders.head.image_tokens(tokens)[:, prefix:].float().cpu()
        grid = _grid(patches.shape[1], preprocess.size)
        for (image, labels), tokens in zip(read, patches, strict=True):
            resized = Image.fromarray(labels).resize((size, size), Image.Resampling.NEAREST)
            yield image, torch.from_numpy(np.array(resized)).long(), tokens.unflatten(0, grid)


def _grid(patches: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patches of an input of ``size``. Raises UserError where they are no grid of its shape."""
    rows = round(math.sqrt(patches * size[0] / size[1]))
    if rows == 0 or patches % rows or abs(rows / size[0] - patches // rows / size[1]) >= 1 / max(size):
        raise UserError(
            f"the vision encoder gives {patches} tokens beside its first for {size[0]} x {size[1]} pixels, which is no grid of "
            "patches: localisation needs an encoder that keeps one."
        )
    return rows, patches // rows


def _add_baselines(meters: dict[str, LocalisationMeter], maps: Tensor, labels: Tensor, seed: int) -> None:
    present = classes_in(labels)
    order = 2 * [*range(1, len(maps))]  # round from each class: the next one that is not there
    other = {label: next((c for c in order[label:] if c not in present), 0) for label in present}
    swapped = maps.clone()
    for label, instead in other.items():
        swapped[label] = maps[instead]
    noise = torch.randn(maps.shape[1:], generator=torch.Generator().manual_seed(seed))
    height, width = labels.shape
    box = torch.zeros(labels.shape, dtype=torch.bool)
    box[height // 4 : height - height // 4, width // 4 : width - width // 4] = True
    meters["name of another class"].add(swapped, labels)
    meters["random map"].add(noise.expand_as(maps), labels)
    meters["whole image"].add_mask(torch.ones_like(box), labels)
    meters["centre box"].add_mask(box, labels)


def _example(image: Image.Image, labels: Tensor, maps: Tensor, names: list[str], threshold: float) -> dict[str, Any]:
    """What is drawn of one image: its class with the largest area."""
    label = max(classes_in(labels), key=lambda c: int((labels == c).sum()))
    predicted, mask = outline(maps[label], labels.shape, threshold), labels == label
    iou = 100 * int((predicted & mask).sum()) / int((predicted | mask).sum())
    return {
        "image": image,
        "name": names[label],
        "map": maps[label].numpy(),
        "predicted": predicted.numpy(),
        "label": mask.numpy(),
        "iou": iou,
    }
