"""Zero-shot classification on data sets beside the recipe's own, such as ImageNet (evaluation protocols, section 1.3)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from datamodules.readers.annotations import AnnotatedImages
from datamodules.readers.base import BadSample
from datamodules.readers.formats import class_folders
from experiments.evaluation.base import EmbeddedSplit, SuiteResult
from models.errors import UserError
from models.io import stable_hash


def zero_shot_sets(
    split: EmbeddedSplit,
    judge: Callable[..., SuiteResult],
    sets: Mapping[str, Mapping[str, str | None]] | None = None,
    prompts_file: str | None = None,
) -> SuiteResult:
    """What ``judge`` finds on each of ``sets``, as ``zeroshot_sets/<name>/...``, and the mean over the sets.

    Args:
        judge: :func:`~experiments.evaluation.zero_shot.zero_shot` with its prompts and rules.
        sets: name -> ``images``, a folder of images for each class (see
            :func:`~datamodules.readers.formats.class_folders`), and ``descriptions``, a JSON of prompts for each class or null.
        prompts_file: JSON of set -> ``classes``, its names in the order of its folders, and ``templates`` with ``{}``
            (STRUCTURE's form, for CLIP's public lists); None: the names of the folders and ``judge``'s own templates.

    Left out with a note without ``sets``. Raises UserError for a picture that cannot be read: a benchmark with holes would
    give a figure of something else.
    """
    if not sets:
        return SuiteResult(notes=["zero-shot sets left out: evaluation.zero_shot_sets.sets names none."])
    prompts = None if prompts_file is None else _read_prompts(prompts_file)
    result, found = SuiteResult(), {}
    for name, given in sets.items():
        if unknown := given.keys() - {"images", "descriptions"}:
            raise UserError(
                f"evaluation.zero_shot_sets.sets.{name}: unknown {sorted(unknown)}; it takes images and descriptions."
            )
        if not given.get("images"):
            raise UserError(f"evaluation.zero_shot_sets.sets.{name}: give its folder of images.")
        data = class_folders(given["images"])
        own = {} if prompts is None else _own_prompts(prompts, prompts_file, name, data)
        names = own.pop("classes", data.class_names)
        one = judge(_as_split(split, data, judge, names), descriptions_file=given.get("descriptions"), **own)
        found[name] = {_short(key): value for key, value in one.metrics.items()}
        result.metrics |= {f"zeroshot_sets/{name}/{key}": value for key, value in found[name].items()}
        for column, values in one.baselines.items():
            into = result.baselines.setdefault(column, {})
            into |= {f"zeroshot_sets/{name}/{_short(key)}": value for key, value in values.items()}
        result.hashes[name] = stable_hash(one.hashes)
    shared = set.intersection(*(set(values) for values in found.values()))
    result.metrics |= {
        f"zeroshot_sets/average/{key}": sum(values[key] for values in found.values()) / len(found) for key in sorted(shared)
    }
    return result


def _short(metric: str) -> str:
    """'zeroshot/top1' to 'top1', 'zeroshot_descriptions/top1' to 'descriptions_top1'."""
    return metric.removeprefix("zeroshot").strip("_/").replace("/", "_")


def _read_prompts(file: str) -> Mapping[str, Any]:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"the prompts file {file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} must map each set to its classes and templates.")
    return content


def _own_prompts(prompts: Mapping[str, Any], file: str, name: str, data: AnnotatedImages) -> dict[str, list[str]]:
    """``classes`` and ``templates`` of a set."""
    entry = prompts.get(name)
    if not isinstance(entry, dict) or not all(
        isinstance(entry.get(key), list) and entry[key] and all(isinstance(x, str) for x in entry[key])
        for key in ("classes", "templates")
    ):
        raise UserError(f"{file}: '{name}' needs a list 'classes' and a list 'templates'; the file names {sorted(prompts)}.")
    if len(entry["classes"]) != len(data.class_names):
        raise UserError(
            f"{file}: '{name}' names {len(entry['classes'])} classes, but {data.folder} holds {len(data.class_names)} folders."
        )
    return {"classes": entry["classes"], "templates": entry["templates"], "templates_file": None}


def _as_split(split: EmbeddedSplit, data: AnnotatedImages, judge: Callable, names: list[str]) -> EmbeddedSplit:

    def load(row: int) -> Image.Image:
        try:
            return data.image(row)
        except BadSample as error:
            raise UserError(f"{data.folder / data.key(row)} cannot be read as an image ({error}).") from error

    if isinstance(judge, partial) and judge.keywords.get("statistics", "own") != "own":
        image = torch.empty(len(data), 0)  # the suite will encode them itself, with other pixel statistics
    else:
        image = split.encoders.embed_images(load(row) for row in range(len(data)))
    none = torch.empty(0)
    return EmbeddedSplit(
        image=image,
        text=none,
        owner=none,
        captions=[],
        encode_text=split.encode_text,
        load_image=load,
        labels=torch.from_numpy(data.labels),
        class_names=names,
        hashes={**split.hashes, "split": data.fingerprint},
        load_encoders=split.load_encoders,
    )
