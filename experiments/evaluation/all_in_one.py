"""Suites of video-language models: matching, questions, choices, retrieval, and what a clip costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from experiments.evaluation.base import SuiteResult, TrainedSplit
from experiments.figures import all_in_one as pictures
from models import batch as keys
from models.all_in_one import objectives
from models.all_in_one.cost import multiply_adds
from models.batch import IGNORE_INDEX
from models.errors import UserError
from models.io import stable_hash
from models.metrics.video_retrieval import any_hit_recall, rank_summary, text_to_video_ranks, video_to_text_ranks

EXAMPLES = 6  # clips that are drawn


def question_answering(trained: TrainedSplit) -> SuiteResult:
    """Open-ended questions and actions: accuracy in percent, by kind of question too.

    ``accuracy`` is over all questions, an answer outside the training vocabulary counting as wrong; ``filtered_accuracy``
    leaves those out, as the official code does. The baseline always gives the commonest training answer of the kind.
    """
    _need(trained, "vqa_classifier", "answer")
    labels, predicted, rows = _collect(trained, "answer")
    dataset = trained.data.splits[trained.name]
    samples = [dataset.samples[row] for row in rows.tolist()]
    kinds = [sample.group for sample in samples]
    hits, known = predicted == labels, labels != IGNORE_INDEX
    metrics = {"answer/accuracy": _percent(hits), "answer/filtered_accuracy": _percent(hits[known])}
    common = _commonest_answers(trained)
    guessed = torch.tensor([common.get(kind, common[""]) for kind in kinds]) == labels
    majority = {"answer/accuracy": _percent(guessed), "answer/filtered_accuracy": _percent(guessed[known])}
    names = sorted(set(kinds) - {""})
    for name in names if len(names) > 1 else []:
        of_kind = torch.tensor([kind == name for kind in kinds])
        metrics[f"answer/{name}_accuracy"] = _percent(hits[of_kind])
        majority[f"answer/{name}_accuracy"] = _percent(guessed[of_kind])
    drawn = {}
    if dataset.answers:
        shown = [
            {
                "row": int(rows[i]),
                "text": samples[i].texts[0],
                "right": dataset.answers[labels[i]] if known[i] else "(not in the vocabulary)",
                "given": dataset.answers[predicted[i]] if predicted[i] < len(dataset.answers) else "(spare class)",
            }
            for i in torch.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).long().tolist()
        ]
        drawn["answers"] = partial(pictures.answered_clips, shown, partial(load_frames, trained))
    return SuiteResult(metrics, {"majority": majority}, _hashes(trained), pictures=drawn)


def multiple_choice(trained: TrainedSplit) -> SuiteResult:
    """Accuracy among the candidates; for VCR of the answer, of the reason, and of both (Q->AR). Chance beside it."""
    module = trained.module
    task = next(task for task in ("option", "choice", "reason") if task in module.tasks)
    _need(trained, {"option": "mc_vqa_classifier"}.get(task, "rank_output"), task)
    labels, predicted, _ = _collect(trained, task)
    hits = (predicted == labels)[labels != IGNORE_INDEX]
    dataset = trained.data.splits[trained.name]
    metrics = {"choice/accuracy": _percent(hits)}
    chance = {"choice/accuracy": 100 / len(dataset.samples[0].texts)}
    if task == "reason":
        reasons, found, _ = _collect(trained, "reason_why")
        known = (labels != IGNORE_INDEX) & (reasons != IGNORE_INDEX)
        metrics["choice/reason_accuracy"] = _percent((found == reasons)[known])
        metrics["choice/both_accuracy"] = _percent(((found == reasons) & (predicted == labels))[known])
        chance["choice/reason_accuracy"] = 100 / len(dataset.samples[0].reasons)
        chance["choice/both_accuracy"] = chance["choice/accuracy"] * chance["choice/reason_accuracy"] / 100
    return SuiteResult(metrics, {"chance": chance}, _hashes(trained))


def pretraining(trained: TrainedSplit) -> SuiteResult:
    """Matching and masked-language accuracy in percent, beside chance and the commonest masked word."""
    metrics: dict[str, float] = {}
    baselines: dict[str, float] = {}
    for task in ("match", "mlm"):
        if task in trained.module.tasks:
            labels, predicted, _ = _collect(trained, task)
            if len(labels):
                metrics[f"{task}/accuracy"] = _percent(predicted == labels)
                baselines[f"{task}/accuracy"] = labels.bincount().max().item() / len(labels) * 100
    return SuiteResult(metrics, {"majority": baselines}, _hashes(trained))


def retrieval(
    trained: TrainedSplit, ks: Sequence[int] = (1, 5, 10), views: int = 1, rerank: int = 0, batch_size: int = 32
) -> SuiteResult:
    """Text-to-video and video-to-text retrieval over the whole split.

    Args:
        views: passes whose similarities are averaged; the first sees the middle frames, further ones random frames (the
            official three are all random). Texts are encoded once.
        rerank: with a dual encoder, how many of its best videos per text are scored again by the fused model; 0: none.
            A model without a dual encoder scores every pair, which takes texts x videos forward passes.
        batch_size: pairs per fused forward pass.

    ``t2v`` gives ties to the query, ``v2t`` averages them (official). R@1 with ties counts only a rank of its own.
    """
    module, dual = trained.module, "contrastive" in trained.module.tasks
    if not dual or rerank:
        _need(trained, "rank_output", "rank")
    if dual:
        _need(trained, "txt_proj", "contrastive")
    ids, mask, rows, videos = _texts_and_clips(trained)
    scores = {}
    if dual:
        texts = torch.cat([module.embed_texts(ids[a : a + 256], mask[a : a + 256]) for a in range(0, len(ids), 256)])
        passes = [
            torch.cat([module.embed_videos(module.embed(batch)) for batch in _batches(trained, view)]) for view in range(views)
        ]
        scores["retrieval"] = torch.stack([objectives.similarity(texts, clips) for clips in passes]).mean(dim=0).cpu()
    if not dual or rerank:
        every = torch.arange(len(videos)).expand(len(ids), -1)
        top = scores["retrieval"].topk(min(rerank, len(videos)), dim=1).indices if dual else every
        scores["reranked" if dual else "fused"] = _fused_scores(trained, ids, mask, videos, top, batch_size)
    owner = torch.arange(len(ids))
    metrics: dict[str, float] = {}
    chance: dict[str, float] = {}
    for name, matrix in scores.items():
        for way, ranks in (("t2v", text_to_video_ranks(matrix, owner)), ("v2t", video_to_text_ranks(matrix, owner))):
            if name == "reranked" and way == "v2t":
                continue  # only the candidates of a text were scored again
            for measure, value in rank_summary(ranks, ks).items():
                metrics[f"{name}/{way}_{measure}"] = value
            chance |= {f"{name}/{way}_recall@{k}": 100 * min(k / len(videos), 1) for k in ks}
        if name == "fused":
            right = torch.eye(len(ids), dtype=torch.bool)
            metrics |= {f"fused/any_hit_recall@{k}": 100 * any_hit_recall(matrix, right, k) for k in ks}
    dataset = trained.data.splits[trained.name]
    best = next(iter(scores.values())).topk(min(4, len(videos)), dim=1).indices
    shown = [
        {"text": dataset.samples[int(rows[i])].texts[0], "right": int(rows[i]), "rows": rows[best[i]].tolist()}
        for i in torch.linspace(0, len(ids) - 1, min(EXAMPLES, len(ids))).long().tolist()
    ]
    drawn = {"retrieved_clips": partial(pictures.retrieved_clips, shown, partial(load_frames, trained))}
    return SuiteResult(metrics, {"chance": chance}, _hashes(trained), pictures=drawn)


def cost(trained: TrainedSplit, repeats: int = 9) -> SuiteResult:
    """GFLOPs of a clip with its text (one multiply-add is two), as computed for token 0, and clips per second, measured.

    Speed is the median over ``repeats`` forward passes of one batch that is there already; reading is not in it.
    """
    module, model = trained.module, trained.module.model
    batch = next(trained.batches())
    frames, side = batch[keys.VIDEO].shape[1], batch[keys.VIDEO].shape[-1]
    ids_key, mask_key = (
        (keys.TOKEN_IDS, keys.TOKEN_MASK) if keys.TOKEN_IDS in batch else (keys.CANDIDATE_IDS, keys.CANDIDATE_MASK)
    )
    texts, mask = (batch[key].flatten(0, -2)[:: batch[key][0].numel() // batch[key].shape[-1]] for key in (ids_key, mask_key))
    length = int(mask.sum(dim=1).max())
    patches = (side // model.transformer.patch_size) ** 2
    seconds = []
    for _ in range(repeats + 1):
        _synchronise(module)
        began = time.perf_counter()
        model.encode_pair(texts[:, :length], mask[:, :length], module.embed(batch), read="first")
        _synchronise(module)
        seconds.append(time.perf_counter() - began)
    flops = 2 * multiply_adds(model, frames, length, patches, save=True)
    metrics = {"cost/gflops_per_clip": flops / 1e9, "cost/clips_per_second": len(texts) / statistics.median(seconds[1:])}
    return SuiteResult(metrics, hashes=_hashes(trained))


def load_frames(trained: TrainedSplit, row: int):
    """(T, h, w, 3) float32 in [0, 1]: what the model sees of a row, without normalisation."""
    import numpy as np

    dataset = trained.data.splits[trained.name]
    clip = dataset.read(row, np.random.default_rng(0))[1]
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in dataset.transform.normalisation)
    return (clip * std + mean).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _batches(trained: TrainedSplit, view: int):
    for batch in trained.data.evaluation_dataloader(trained.name, view=view):
        trained.data.report_skipped(trained.name, batch.pop(keys.SKIPPED, []))
        if len(batch[keys.INDEX]):
            yield trained.module.transfer_batch_to_device(batch, trained.module.device, 0)


def _texts_and_clips(trained: TrainedSplit) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """ids, mask (n, L), rows (n,), and the clips one by one, on the CPU."""
    parts: list[tuple] = []
    clips: list[Tensor] = []
    for batch in _batches(trained, 0):
        parts.append((batch[keys.TOKEN_IDS], batch[keys.TOKEN_MASK], batch[keys.INDEX].cpu()))
        clips += list(batch[keys.VIDEO].cpu())
    ids, mask, rows = (torch.cat(part) for part in zip(*parts, strict=True))
    return ids, mask, rows, clips


def _fused_scores(
    trained: TrainedSplit, ids: Tensor, mask: Tensor, videos: list[Tensor], chosen: Tensor, batch_size: int
) -> Tensor:
    """(n, m) scores of the ranking head for the ``chosen`` videos (n, k) of each text; minus infinity elsewhere.

    Videos are taken one after the other: each is embedded once, for all the texts that it is scored with.
    """
    model, device = trained.module.model, trained.module.device
    scores = torch.full((len(ids), len(videos)), float("-inf"))
    for column, video in enumerate(videos):
        texts = torch.nonzero((chosen == column).any(dim=1)).flatten()
        if not len(texts):
            continue
        patches = model.embed(video[None].to(device))
        for start in range(0, len(texts), batch_size):
            rows = texts[start : start + batch_size]
            found = objectives.candidate_scores(model, "rank_output", ids[rows][None], mask[rows][None], patches)
            scores[rows, column] = found[0].float().cpu()
    return scores


def _collect(trained: TrainedSplit, task: str) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, predictions and rows of every sample of a task."""
    labels, predicted, rows = [], [], []
    for batch in trained.batches():
        outputs = trained.module.shared_step(batch, "test").outputs
        labels.append(outputs[f"{task}_labels"].cpu())
        predicted.append(outputs[f"{task}_logits"].argmax(dim=-1).cpu())
        rows.append(batch[keys.INDEX].cpu())
    return torch.cat(labels), torch.cat(predicted), torch.cat(rows)


def _commonest_answers(trained: TrainedSplit) -> dict[str, int]:
    """Kind of question -> its commonest training answer; "": of all."""
    train = trained.data.splits.get("train", trained.data.splits[trained.name])
    counts: dict[str, dict[int, int]] = {"": {}}
    for sample in train.samples:
        for kind in {"", sample.group}:
            counts.setdefault(kind, {})[sample.answer] = counts.get(kind, {}).get(sample.answer, 0) + 1
    return {kind: max(of, key=of.get) for kind, of in counts.items()}


def _need(trained: TrainedSplit, head: str, task: str) -> None:
    """A head that no checkpoint has filled must not be judged."""
    if not hasattr(trained.module.model, head) or head in trained.module.fresh_heads:
        raise UserError(
            f"the checkpoint has no trained head for '{task}' ({head}). Fine-tune it first "
            "(stages=[prepare,fit,evaluate,report] checkpoint=<file>), or evaluate the tasks it was trained on."
        )


def _percent(hits: Tensor) -> float:
    return hits.float().mean().item() * 100


def _hashes(trained: TrainedSplit) -> dict[str, str]:
    return {"split": stable_hash([trained.data.splits[trained.name].fingerprint, trained.name])}


def _synchronise(module: torch.nn.Module) -> None:
    if module.device.type == "cuda":
        torch.cuda.synchronize()
