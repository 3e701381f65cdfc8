"""Zero-shot classification on data sets other than the recipe's, such as ImageNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from PIL import Image

from datamodules.readers.annotations import AnnotatedImages
from datamodules.readers.formats import class_folders
from datamodules.readers.images import open_required
from datamodules.readers.text import read_json
from experiments.evaluation.base import EmbeddedSplit, SuiteResult
from experiments.evaluation.zero_shot import Statistics, embed_images, preprocessing_hash
from models.errors import UserError
from models.io import stable_hash


def zero_shot_sets(
    split: EmbeddedSplit,
    judge: Callable[..., SuiteResult],
    sets: Mapping[str, Mapping[str, str | None]] | None = None,
    prompts_file: str | None = None,
    statistics: Statistics = "own",
) -> SuiteResult:
    """What ``judge`` gives on each of ``sets``, as ``zeroshot_sets/<name>/...``, and the mean over the sets.

    Args:
        judge: :func:`~experiments.evaluation.zero_shot.zero_shot` with its prompts and rules.
        sets: name -> ``images``, a folder of images for each class (see
            :func:`~datamodules.readers.formats.class_folders`), and ``descriptions``, a JSON of prompts for each class or null.
        prompts_file: JSON of set -> ``classes``, its names in the order of its folders, and ``templates`` with ``{}``
            (STRUCTURE's form, for CLIP's public lists); None: the names of the folders and the templates of ``judge``.
        statistics: of the pixels, see :func:`~experiments.evaluation.zero_shot.zero_shot`.

    Left out with a note without ``sets``. Raises UserError for an image that cannot be read: skipping images would change
    the benchmark.
    """
    if not sets:
        return SuiteResult(notes=["zero-shot sets left out: evaluation.zero_shot_sets.sets names none."])
    prompts = None if prompts_file is None else _read_prompts(prompts_file)
    result, by_set = SuiteResult(), {}
    for name, paths in sets.items():
        if unknown := paths.keys() - {"images", "descriptions"}:
            raise UserError(
                f"evaluation.zero_shot_sets.sets.{name}: unknown {sorted(unknown)}; it takes images and descriptions."
            )
        if not paths.get("images"):
            raise UserError(f"evaluation.zero_shot_sets.sets.{name}: give its folder of images.")
        data = class_folders(paths["images"])
        options = {} if prompts is None else _prompts_of(prompts, prompts_file, name, data)
        subject = _as_split(split, data, options.pop("classes", data.class_names), statistics)
        # The images are encoded with these statistics already.
        one = judge(subject, descriptions_file=paths.get("descriptions"), statistics="own", **options)
        by_set[name] = {_short(key): value for key, value in one.metrics.items()}
        result.metrics |= {f"zeroshot_sets/{name}/{key}": value for key, value in by_set[name].items()}
        for column, values in one.baselines.items():
            into = result.baselines.setdefault(column, {})
            into |= {f"zeroshot_sets/{name}/{_short(key)}": value for key, value in values.items()}
        result.hashes[name] = stable_hash(one.hashes)
    shared = set.intersection(*(set(values) for values in by_set.values()))
    result.metrics |= {
        f"zeroshot_sets/average/{key}": sum(values[key] for values in by_set.values()) / len(by_set) for key in sorted(shared)
    }
    return result


def _short(metric: str) -> str:
    """'zeroshot/top1' to 'top1', 'zeroshot_descriptions/top1' to 'descriptions_top1'."""
    return metric.removeprefix("zeroshot").strip("_/").replace("/", "_")


def _read_prompts(file: str) -> Mapping[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise UserError(f"{file} must map each set to its classes and templates.")
    return content


def _prompts_of(prompts: Mapping[str, Any], file: str, name: str, data: AnnotatedImages) -> dict[str, list[str]]:
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


def _as_split(split: EmbeddedSplit, data: AnnotatedImages, names: list[str], statistics: Statistics) -> EmbeddedSplit:
    def load(row: int) -> Image.Image:
        return open_required(data.folder / data.key(row))

    return EmbeddedSplit(
        image=embed_images(split, map(load, range(len(data))), statistics),
        text=torch.empty(0),
        owner=torch.empty(0),
        captions=[],
        encode_text=split.encode_text,
        load_image=load,
        labels=torch.from_numpy(data.labels),
        class_names=names,
        hashes={**split.hashes, "split": data.fingerprint, "preprocessing": preprocessing_hash(split, statistics)},
        load_encoders=split.load_encoders,
    )
