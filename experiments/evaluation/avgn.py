"""Accuracy against compute of a glance network: several budgets, other ways of choosing, patch sizes and early exit.

All of a run's rows come from the same trained weights; what differs is where they look. Multiply-adds are counted from the
modules that ran, and videos per second are measured on this machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from experiments.evaluation.base import SuiteResult, TrainedSplit
from experiments.figures import avgn as pictures
from models.avgn.compute import counting_macs
from models.avgn.exits import ALWAYS, Criterion, apply_exit, exit_confidence, exit_thresholds
from models.avgn.network import AVGN
from models.batch import AUDIO, AUDIO_VALID, INDEX, LABELS, VIDEO
from models.io import stable_hash
from models.metrics.average_precision import mean_average_precision
from models.metrics.classification import top_k_accuracy

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
    pictured: int = 4,
) -> SuiteResult:
    """The trained network at its own setting, then at every budget beside its rivals, and its curves.

    Args:
        budgets: K, snippets looked at closely; those above the number of snippets or prediction heads are left out.
        patch_sizes: P tried at the network's own K, besides its own.
        exit_p: of the thresholds of early exit: below 1 most videos leave early. Only for a network trained in saliency order.
        criterion: of early exit. exit_videos: of the training split, on which thresholds are found.
        metric: what the budget rows and curves show: mAP in percent, or top-1.
        timed_videos: videos of a batch whose processing is timed, with and without batching. pictured: videos drawn.
    """
    net: AVGN = split.module.network
    settings, kept = _settings(net, split, budgets, patch_sizes)
    scores, sample = _Scores(net, settings), None
    for batch in split.batches():
        torch.manual_seed(int(batch[INDEX][0]))  # chance, where a setting takes it, is the same in every evaluation
        scores.add(batch)
        sample = batch if sample is None else sample
    labels = torch.cat(scores.labels)
    values = {name: _accuracy(torch.cat(parts), labels) for name, parts in scores.logits.items()}
    sample = {key: value[:timed_videos] for key, value in sample.items() if isinstance(value, Tensor)}
    costs = {name: _cost(net, sample, setting) for name, setting in settings.items()}
    costs |= {f"AVGN@K{kept}": costs["own"]} if f"AVGN@K{kept}" in costs else {}  # the same thing, timed twice
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
        who, _, what = name.rpartition("@")
        column = metrics if who in ("AVGN", "patch size") else baselines.setdefault(who, {})
        column |= {f"{metric}@{what}": values[name][metric], f"gflops@{what}": costs[name]["gflops"]}
        column[f"videos_per_s@{what}"] = costs[name]["videos_per_s"]
        curves.setdefault(who, []).append(Point(what, costs[name]["gflops"], values[name][metric]))
    for who in RIVALS:  # at the network's own budget, beside its own row
        own = f"{who}@K{kept}"
        if own in values:
            baselines[who] |= values[own] | {k: v for k, v in costs[own].items() if k != "parts"}
    notes = []
    if exit_p and net.order == "saliency":
        found, points = _early_exit(split, net, torch.cat(scores.steps), labels, sample, exit_p, criterion, exit_videos, metric)
        metrics |= found
        curves["early exit"] = points
    elif exit_p:
        notes.append(
            "early exit left out: the network was trained in temporal order (module.network.order=saliency trains for it)."
        )
    if scores.silent:
        notes.append(f"NO SOUND: {scores.silent} of {len(labels)} videos of the split {split.name} have no sound track.")
    drawn = {
        "accuracy_against_compute": partial(
            pictures.curves, curves, Point("this run", metrics["gflops"], metrics[metric]), metric
        ),
        "glances": partial(pictures.glances, _examples(split, net, sample, pictured)),
    }
    hashes = {"split": split.data.splits[split.name].fingerprint, "settings": stable_hash([sorted(settings), list(exit_p)])}
    return SuiteResult(metrics, baselines, hashes, notes, drawn)


def _settings(
    net: AVGN, split: TrainedSplit, budgets: Sequence[int], patch_sizes: Sequence[int]
) -> tuple[dict[str, dict[str, Any]], int]:
    """Settings by name, ``own`` first, and the network's own K."""
    most = min(len(net.classifier.heads.bias), split.data.facts()["snippets"])
    own = min(net.num_selected, most)
    found: dict[str, dict[str, Any]] = {"own": {"num_selected": own}}
    for budget in sorted({k for k in budgets if k <= most}):
        found[f"AVGN@K{budget}"] = {"num_selected": budget}
        found |= {f"{who}@K{budget}": {"num_selected": budget, **rival} for who, rival in RIVALS.items()}
    for size in patch_sizes:
        if size != net.patch_size and size < net.image_size:
            found[f"patch size@P{size}"] = {"num_selected": own, "patch_size": size}
    return found, own


def _accuracy(logits: Tensor, labels: Tensor) -> dict[str, float]:
    found = {f"top{k}": top_k_accuracy(logits, labels[:, 0], k) for k in (1, 5) if k < logits.shape[1]}
    return {**found, "mAP": mean_average_precision(logits.softmax(dim=1), labels)}


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
        seconds = _timed(lambda: net(*inputs), inputs[0].device)
        alone = tuple(value[:1] for value in inputs)
        latency = _timed(lambda: net(*alone), inputs[0].device)
    parts = {part: count / videos / 1e9 for part, count in counted.items() if count}
    return {"gflops": sum(parts.values()), "videos_per_s": videos / seconds, "latency_ms": 1e3 * latency, "parts": parts}


def _against_full_size(net: AVGN, sample: dict, own: dict[str, Any]) -> dict[str, float]:
    """What looking at whole frames of every snippet would cost with the same parts, timed turn by turn with the own setting, so
    that both meet the same noise. Its accuracy is another matter: these weights are not trained for it."""
    inputs, device = _inputs(sample), sample[VIDEO].device
    full = {"num_selected": inputs[0].shape[1], "patch_size": net.image_size, "order": "temporal"}
    if len(net.classifier.heads.bias) < full["num_selected"]:
        return {}
    with net.using(**full), counting_macs(net) as counted:
        net(*inputs)
    turns = []
    for _ in range(7):
        seconds = []
        for setting in (own, full):
            with net.using(**setting):
                seconds.append(_timed(lambda: net(*inputs), device, repeats=1))
        turns.append(seconds)
    speed = statistics.median(whole / chosen for chosen, whole in turns)
    whole = sum(counted.values()) / len(inputs[0]) / 1e9
    return {"gflops_at_full_size": whole, "times_faster_than_full_size": speed}


def _timed(work: Callable[[], Any], device: torch.device, repeats: int = 5) -> float:
    """Seconds of the fastest of a few runs: what others do on the machine only ever adds."""
    fastest = float("inf")
    for _ in range(repeats):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        fastest = min(fastest, time.perf_counter() - began)
    return fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds_by_part(net: AVGN, sample: dict, setting: dict[str, Any]) -> dict[str, float]:
    """Milliseconds per video of each part of the network in a batch of all of ``sample``."""
    device, spent, starts = sample[VIDEO].device, {}, {}

    def begin(module: torch.nn.Module, _: Any, name: str) -> None:
        _wait(device)
        starts[name] = time.perf_counter()

    def end(module: torch.nn.Module, _: Any, __: Any, name: str) -> None:
        _wait(device)
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
    metrics, points, inputs = {}, [], _inputs(sample)
    for p in exit_p:
        thresholds = exit_thresholds(confidence, p)
        left = apply_exit(steps.transpose(0, 1), thresholds, criterion)
        value = _accuracy(left.logits, labels)[metric]
        by_step = _macs_by_step(net, inputs, len(thresholds))
        gflops = float((left.counts * by_step).sum() / len(labels))
        seconds = _timed(lambda t=thresholds: net.early_exit(*inputs, t, criterion), inputs[0].device)
        metrics |= {
            f"{metric}@exit_p{p:g}": value,
            f"gflops@exit_p{p:g}": gflops,
            f"steps@exit_p{p:g}": float(left.steps.double().mean() + 1),
            f"videos_per_s@exit_p{p:g}": len(inputs[0]) / seconds,
        }
        points.append(Point(f"p{p:g}", gflops, value))
    return metrics, points


def _macs_by_step(net: AVGN, inputs: tuple[Tensor, ...], steps: int) -> Tensor:
    """(K,) multiply-adds (G) of a video that leaves at each step, counted from runs in which one does."""
    one, found = tuple(value[:1] for value in inputs), []
    for last in range(steps):
        thresholds = torch.full((steps,), float("inf"))
        thresholds[last] = ALWAYS
        with counting_macs(net) as counted:
            net.early_exit(*one, thresholds)
        found.append(sum(counted.values()) / 1e9)
    return torch.tensor(found, dtype=torch.float64)


# ---- pictures --------------------------------------------------------------------------------------------------------


def _examples(split: TrainedSplit, net: AVGN, sample: dict, count: int) -> list[pictures.Example]:
    names = split.data.class_names
    sample = {key: value[:count] for key, value in sample.items()}
    titles = [", ".join(names[label] for label in labels if label >= 0) for labels in sample[LABELS].tolist()]
    return glanced(net, sample, titles, names)


def glanced(net: AVGN, sample: dict, titles: Sequence[str], class_names: Sequence[str]) -> list[pictures.Example]:
    """What the network looked at in each video of a batch, for :func:`experiments.figures.avgn.glances`."""
    frames, clips, heard = _inputs(sample)
    glance = net.glance(frames, clips, heard)
    found = net.decide(frames, glance)
    scores = net.saliency(glance).logits if found.saliency is None else found.saliency
    return [
        pictures.Example(
            title=f"{title}; predicted {class_names[int(found.logits[video, -1].argmax())]}",
            energy=clips[video].square().mean(dim=-1).sqrt().cpu().numpy(),
            saliency=scores[video].softmax(dim=0).cpu().numpy(),
            chosen=found.indices[video].cpu().numpy(),
            frames=frames[video, found.indices[video]].permute(0, 2, 3, 1).cpu().numpy(),
            corners=(found.actions[video] * (net.image_size - net.patch_size)).float().cpu().numpy(),
            patch_size=net.patch_size,
        )
        for video, title in enumerate(titles)
    ]
