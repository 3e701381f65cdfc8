"""Accuracy against compute of a glance network: several budgets, other ways of choosing, patch sizes and early exit.

All of a run's rows come from the same trained weights; what differs is where they look. Multiply-adds are counted from the
modules that ran, and videos per second are measured on this machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datamodules.audio_visual import Snippets
from experiments.benchmarks.measure import fastest, seconds, synchronize
from experiments.evaluation.base import SuiteResult, TrainedSplit
from experiments.evaluation.errors import ErrorRow, confidence_of_wrong, strip, worst
from experiments.figures import avgn as drawing
from lightning_modules.held_out import check_finite, check_weights
from models.avgn.compute import counting_macs
from models.avgn.evaluation import glance_metrics
from models.avgn.exits import ALWAYS, Criterion, apply_exit, exit_confidence, exit_thresholds
from models.avgn.network import AVGN
from models.batch import AUDIO, AUDIO_VALID, INDEX, LABELS, VIDEO
from models.io import stable_hash
from models.metrics.average_precision import mean_average_precision

# Other ways of spending the same budget, with the same weights: what replaces the network's own settings.
RIVALS: dict[str, dict[str, Any]] = {
    "middle patches": {"policy_form": "centre"},
    "visual-only selection": {"select": "saliency_visual"},
    "uniform frames": {"select": "uniform"},
    "random frames and patches": {"select": "random", "policy_form": "random"},
}


class Point(NamedTuple):
    """One setting: multiply-adds (G) and accuracy (percent), with a name for the curves."""

    name: str
    gflops: float
    accuracy: float


class _Scores:
    """Final logits of all videos for many settings, from one glance per video."""

    def __init__(self, net: AVGN, settings: dict[str, dict[str, Any]]):
        self.net, self.settings = net, settings
        self.logits: dict[str, list[Tensor]] = {name: [] for name in settings}
        self.steps: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.index: list[Tensor] = []
        self.silent = 0

    def add(self, batch: dict) -> None:
        net = self.net
        glance = net.glance(batch[VIDEO], batch[AUDIO], batch[AUDIO_VALID])
        for name, setting in self.settings.items():
            with net.using(**setting):
                logits = net.decide(batch[VIDEO], glance).logits.float().cpu()
            self.logits[name].append(logits[:, -1])
            if name == "own":
                self.steps.append(logits)
        self.labels.append(batch[LABELS].cpu())
        self.index.append(batch[INDEX].cpu())
        self.silent += int((~batch[AUDIO_VALID]).sum())


def glance_budgets(
    split: TrainedSplit,
    budgets: Sequence[int] = (1, 2, 4, 8, 16),
    patch_sizes: Sequence[int] = (),
    exit_p: Sequence[float] = (0.6, 1.0, 1.6),
    criterion: Criterion = "confidence",
    exit_videos: int = 512,
    metric: Literal["top1", "mAP"] = "mAP",
    timed_videos: int = 64,
    examples: int = 4,
) -> SuiteResult:
    """The trained network at its own setting, then at every budget beside its rivals, and its curves.

    Args:
        budgets: K, snippets looked at closely; those above the number of snippets or prediction heads are left out.
        patch_sizes: P tried at the network's own K, besides its own.
        exit_p: of the thresholds of early exit: below 1 most videos leave early. Only for a network trained in saliency order.
        criterion: of early exit. exit_videos: of the training split, on which thresholds are found.
        metric: what the budget rows and curves show: mAP in percent, or top-1.
        timed_videos: videos of a batch whose processing is timed, with and without batching.
        examples: videos that are drawn.
    """
    check_weights(split.module)
    net: AVGN = split.module.model
    settings, budget = _settings(net, split, budgets, patch_sizes)
    scores, sample = _Scores(net, settings), None
    for batch in split.batches():
        torch.manual_seed(int(batch[INDEX][0]))  # chance, where a setting takes it, is the same in every evaluation
        scores.add(batch)
        sample = batch if sample is None else sample
    labels = torch.cat(scores.labels)
    check_finite({INDEX: torch.cat(scores.index), "logits": torch.cat(scores.logits["own"])})
    values = {name: glance_metrics(torch.cat(parts), labels) for name, parts in scores.logits.items()}
    sample = {key: value[:timed_videos] for key, value in sample.items() if isinstance(value, Tensor)}
    costs = {name: _cost(net, sample, setting) for name, setting in settings.items()}
    costs |= {f"AVGN@K{budget}": costs["own"]} if f"AVGN@K{budget}" in costs else {}  # the same thing, timed twice
    metrics = {**values["own"], **{key: value for key, value in costs["own"].items() if key != "parts"}}
    metrics |= _against_full_size(net, sample, settings["own"])
    metrics |= _official_map(torch.cat(scores.logits["own"]), labels)
    metrics |= {f"gflops_of/{part}": value for part, value in costs["own"]["parts"].items()}
    metrics |= {f"ms_per_video_of/{part}": value for part, value in _seconds_by_part(net, sample, settings["own"]).items()}
    metrics["videos_without_sound"] = 100 * scores.silent / len(labels)
    baselines: dict[str, dict[str, float]] = {"chance": {"top1": 100 / len(split.data.class_names)}}
    curves: dict[str, list[Point]] = {}
    for name in settings:
        if name == "own":
            continue
        who, _, mark = name.rpartition("@")
        column = metrics if who in ("AVGN", "patch size") else baselines.setdefault(who, {})
        column |= {f"{metric}@{mark}": values[name][metric], f"gflops@{mark}": costs[name]["gflops"]}
        column[f"videos_per_s@{mark}"] = costs[name]["videos_per_s"]
        curves.setdefault(who, []).append(Point(mark, costs[name]["gflops"], values[name][metric]))
    for who in RIVALS:  # at the network's own budget, beside its own row
        same = f"{who}@K{budget}"
        if same in values:
            baselines[who] |= values[same] | {k: v for k, v in costs[same].items() if k != "parts"}
    notes = []
    if exit_p and net.order == "saliency":
        exits, points = _early_exit(split, net, torch.cat(scores.steps), labels, sample, exit_p, criterion, exit_videos, metric)
        metrics |= exits
        curves["early exit"] = points
    elif exit_p:
        notes.append(
            "early exit left out: the network was trained in temporal order (module.model.order=saliency trains for it)."
        )
    if scores.silent:
        notes.append(f"NO SOUND: {scores.silent} of {len(labels)} videos of the split {split.name} have no sound track.")
    figures = {
        "accuracy_against_compute": partial(
            drawing.curves, curves, Point("this run", metrics["gflops"], metrics[metric]), metric
        ),
        "glances": partial(drawing.glances, _examples(split, net, sample, examples)),
    }
    hashes = {"split": split.data.splits[split.name].fingerprint, "settings": stable_hash([sorted(settings), list(exit_p)])}
    errors = {"classes": _errors(split, torch.cat(scores.index), torch.cat(scores.logits["own"]), labels)}
    return SuiteResult(metrics, baselines, hashes, notes, figures, errors)


def _settings(
    net: AVGN, split: TrainedSplit, budgets: Sequence[int], patch_sizes: Sequence[int]
) -> tuple[dict[str, dict[str, Any]], int]:
    """Settings by name, ``own`` first, and the network's own K."""
    most = min(len(net.classifier.heads.bias), split.data.facts()["snippets"])
    trained = min(net.num_selected, most)
    settings: dict[str, dict[str, Any]] = {"own": {"num_selected": trained}}
    for budget in sorted({k for k in budgets if k <= most}):
        settings[f"AVGN@K{budget}"] = {"num_selected": budget}
        settings |= {f"{who}@K{budget}": {"num_selected": budget, **rival} for who, rival in RIVALS.items()}
    for size in patch_sizes:
        if size != net.patch_size and size < net.image_size:
            settings[f"patch size@P{size}"] = {"num_selected": trained, "patch_size": size}
    return settings, trained


def _official_map(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Where classes are absent from the split, also mAP over all classes and as AdaFocusV2's code computes it."""
    if len(labels[labels >= 0].unique()) == logits.shape[1]:
        return {}
    scores = logits.softmax(dim=1)
    return {
        "mAP_all_classes": mean_average_precision(scores, labels, "zero"),
        "mAP_official": mean_average_precision(scores, labels, "official"),
    }


# ---- cost ------------------------------------------------------------------------------------------------------------


def _inputs(sample: dict) -> tuple[Tensor, Tensor, Tensor]:
    return sample[VIDEO], sample[AUDIO], sample[AUDIO_VALID]


def _cost(net: AVGN, sample: dict, setting: dict[str, Any]) -> dict[str, Any]:
    """Multiply-adds (G) of one video, of which parts, and videos per second in one batch of all of ``sample``."""
    inputs = _inputs(sample)
    with net.using(**setting), counting_macs(net) as counted:
        net(*inputs)
    videos = len(inputs[0])
    with net.using(**setting):
        batched = fastest(lambda: net(*inputs), inputs[0].device)
        alone = tuple(value[:1] for value in inputs)
        latency = fastest(lambda: net(*alone), inputs[0].device)
    parts = {part: count / videos / 1e9 for part, count in counted.items() if count}
    return {"gflops": sum(parts.values()), "videos_per_s": videos / batched, "latency_ms": 1e3 * latency, "parts": parts}


def _against_full_size(net: AVGN, sample: dict, own_setting: dict[str, Any]) -> dict[str, float]:
    """What looking at whole frames of every snippet would cost with the same parts, timed turn by turn with the own setting, so
    that both meet the same noise. Its accuracy is another matter: these weights are not trained for it."""
    inputs, device = _inputs(sample), sample[VIDEO].device
    full: dict[str, Any] = {"num_selected": inputs[0].shape[1], "patch_size": net.image_size, "order": "temporal"}
    if len(net.classifier.heads.bias) < full["num_selected"]:
        return {}
    with net.using(**full), counting_macs(net) as counted:
        net(*inputs)
    turns = []
    for _ in range(7):
        turn = []
        for setting in (own_setting, full):
            with net.using(**setting):
                turn.append(seconds(lambda: net(*inputs), device))
        turns.append(turn)
    speed = statistics.median(whole / chosen for chosen, whole in turns)
    whole = sum(counted.values()) / len(inputs[0]) / 1e9
    return {"gflops_at_full_size": whole, "times_faster_than_full_size": speed}


def _seconds_by_part(net: AVGN, sample: dict, setting: dict[str, Any]) -> dict[str, float]:
    """Milliseconds per video of each part of the network in a batch of all of ``sample``."""
    device = sample[VIDEO].device
    spent: dict[str, float] = {}
    starts: dict[str, float] = {}

    def begin(module: torch.nn.Module, _: Any, name: str) -> None:
        synchronize(device)
        starts[name] = time.perf_counter()

    def end(module: torch.nn.Module, _: Any, __: Any, name: str) -> None:
        synchronize(device)
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - starts[name]

    hooks = []
    for name, module in net.named_children():
        hooks += [
            module.register_forward_pre_hook(lambda m, a, name=name: begin(m, a, name)),
            module.register_forward_hook(lambda m, a, o, name=name: end(m, a, o, name)),
        ]
    with net.using(**setting):
        net(*_inputs(sample))
    for hook in hooks:
        hook.remove()
    return {name: 1e3 * seconds / len(sample[VIDEO]) for name, seconds in spent.items()}


# ---- early exit ------------------------------------------------------------------------------------------------------


def _early_exit(
    split: TrainedSplit,
    net: AVGN,
    steps: Tensor,
    labels: Tensor,
    sample: dict,
    exit_p: Sequence[float],
    criterion: Criterion,
    videos: int,
    metric: str,
) -> tuple[dict[str, float], list[Point]]:
    """Rows and curve of early exit: thresholds from training videos, counted and measured with batches that shrink."""
    training, seen = [], 0
    for batch in TrainedSplit(split.module, split.data, "train").batches():
        training.append(net(*_inputs(batch)).logits.float().cpu())
        seen += len(training[-1])
        if seen >= videos:
            break
    confidence = exit_confidence(torch.cat(training)[:videos], criterion).T
    metrics: dict[str, float] = {}
    points, inputs = [], _inputs(sample)
    for p in exit_p:
        thresholds = exit_thresholds(confidence, p)
        left = apply_exit(steps.transpose(0, 1), thresholds, criterion)
        value = glance_metrics(left.logits, labels)[metric]
        by_step = _macs_by_step(net, inputs, len(thresholds))
        gflops = float((left.counts * by_step).sum() / len(labels))
        shrinking = fastest(partial(net.early_exit, *inputs, thresholds, criterion), inputs[0].device)
        metrics |= {
            f"{metric}@exit_p{p:g}": value,
            f"gflops@exit_p{p:g}": gflops,
            f"steps@exit_p{p:g}": float(left.steps.double().mean() + 1),
            f"videos_per_s@exit_p{p:g}": len(inputs[0]) / shrinking,
        }
        points.append(Point(f"p{p:g}", gflops, value))
    return metrics, points


def _macs_by_step(net: AVGN, inputs: tuple[Tensor, ...], steps: int) -> Tensor:
    """(K,) multiply-adds (G) of a video that leaves at each step, counted from runs in which one does."""
    video, audio, valid = (value[:1] for value in inputs)
    by_step = []
    for last in range(steps):
        thresholds = torch.full((steps,), float("inf"))
        thresholds[last] = ALWAYS
        with counting_macs(net) as counted:
            net.early_exit(video, audio, valid, thresholds)
        by_step.append(sum(counted.values()) / 1e9)
    return torch.tensor(by_step, dtype=torch.float64)


# ---- examples and errors -----------------------------------------------------------------------------------------------


def _errors(split: TrainedSplit, index: Tensor, logits: Tensor, labels: Tensor) -> list[ErrorRow]:
    """The videos about whose class the network is most confident and wrong: none of the true ones."""
    names, dataset, severity = split.data.class_names, split.data.splits[split.name], confidence_of_wrong(logits, labels)
    return [
        {
            "video": dataset.key(int(index[i])),
            "frames": partial(_strip, dataset, int(index[i])),
            "truth": ", ".join(names[label] for label in labels[i].tolist() if label >= 0),
            "predicted": names[int(logits[i].argmax())],
            "confidence": 100 * float(severity[i]),
        }
        for i in worst(severity)
    ]


def _strip(dataset: Snippets, row: int) -> Image.Image:
    """Four frames of a video, at equal distances."""
    frames = dataset.read(row, np.random.default_rng(0)).frames
    places = np.linspace(0, len(frames) - 1, min(4, len(frames))).round().astype(int)
    return strip(frames[places].transpose(0, 2, 3, 1) / 255)


def _examples(split: TrainedSplit, net: AVGN, sample: dict, count: int) -> list[drawing.Example]:
    names = split.data.class_names
    sample = {key: value[:count] for key, value in sample.items()}
    titles = [", ".join(names[label] for label in labels if label >= 0) for labels in sample[LABELS].tolist()]
    return examples_of(net, sample, titles, names)


def examples_of(net: AVGN, sample: dict, titles: Sequence[str], class_names: Sequence[str]) -> list[drawing.Example]:
    """What the network looked at in each video of a batch, for :func:`experiments.figures.avgn.glances`."""
    frames, clips, heard = _inputs(sample)
    glance = net.glance(frames, clips, heard)
    output = net.decide(frames, glance)
    scores = net.saliency(glance).logits if output.saliency is None else output.saliency
    return [
        drawing.Example(
            title=f"{title}; predicted {class_names[int(output.logits[video, -1].argmax())]}",
            energy=clips[video].square().mean(dim=-1).sqrt().cpu().numpy(),
            saliency=scores[video].softmax(dim=0).cpu().numpy(),
            chosen=output.indices[video].cpu().numpy(),
            frames=frames[video, output.indices[video]].permute(0, 2, 3, 1).cpu().numpy(),
            corners=(output.actions[video] * (net.image_size - net.patch_size)).float().cpu().numpy(),
            patch_size=net.patch_size,
        )
        for video, title in enumerate(titles)
    ]
