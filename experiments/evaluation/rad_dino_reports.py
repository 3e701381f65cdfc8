"""Reports written from a frozen encoder's patches, beside an encoder that was not trained and the commonest report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from experiments.evaluation.base import SuiteResult, TrainedSplit
from experiments.evaluation.rad_dino import RANDOM, reset
from models.batch import IMAGE
from models.rad_dino.backbone import DinoViT
from models.rad_dino.batch import REPORT
from models.rad_dino.reports import (
    Labels,
    ReportModel,
    Writer,
    named_findings,
    report_metrics,
    small_writer,
    train_reports,
)


def reports(
    split: TrainedSplit,
    writer: Callable[[Sequence[str]], Writer] = small_writer,
    labels: Labels = named_findings,
    steps: int = 2000,
    batch_size: int = 32,
    lr: float = 1e-3,
    images: int = 2000,
    longest: int = 120,
    untrained: bool = True,
    seed: int = 0,
) -> SuiteResult:
    """BLEU-4, ROUGE-L and the F1 of the findings named, in percent, of reports of the split.

    Projector and language model are trained on the split train with the encoder frozen. Images without a report are left out.

    Args:
        split: the trained module and its data.
        writer: ``(training reports) -> language model and tokenizer``.
        labels: ``(report, names) -> 1 or 0 per finding``, the rule that reads findings out of reports.
        steps, batch_size, lr: of the training.
        images: of train whose patches are held in memory, drawn once.
        longest: tokens of a report at most.
        untrained: also write from the same network with random weights.
        seed: of the models' first weights and the batches.
    """
    known = [report for report in split.data.splits["train"].reports if report]
    if not known or not any(split.dataset.reports):
        return SuiteResult(notes=["Reports left out: the data has none for training or for evaluation."])
    names = list(split.data.label_names)

    def written(encoder: DinoViT) -> tuple[list[str], list[str]]:
        patches, texts = _patches(encoder, split, "train", split.data.first_rows(images).tolist())
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            new = ReportModel(encoder.dim, writer(known)).to(split.module.device)
            model = train_reports(new, patches, texts, steps, batch_size, lr, seed)
        patches, texts = _patches(encoder, split, split.name)
        parts = [model.write(part.to(split.module.device).float(), longest) for part in patches.split(batch_size)]
        return [text for part in parts for text in part], texts

    generated, references = written(split.module.encoder)
    prefixed = {"this run": report_metrics(generated, references, names, labels)}
    if untrained:
        prefixed[RANDOM] = report_metrics(*written(reset(split.module.encoder, seed)), names, labels)
    commonest = Counter(known).most_common(1)[0][0]
    prefixed["commonest report"] = report_metrics([commonest] * len(references), references, names, labels)
    columns = {column: {f"reports/{name}": value for name, value in metrics.items()} for column, metrics in prefixed.items()}
    example = f"A report of the split {split.name}: {references[0]!r}; written: {generated[0]!r}"
    return SuiteResult(columns.pop("this run"), columns, dict(split.hashes), [example])


def _patches(encoder: DinoViT, split: TrainedSplit, name: str, rows: list[int] | None = None) -> tuple[Tensor, list[str]]:
    """(N, patches, D) float16 on the CPU and the reports of the images that have one."""
    patches, texts = [], []
    for batch in TrainedSplit(split.module, split.data, name).batches(crops=False, rows=rows):
        chosen = [number for number, report in enumerate(batch[REPORT]) if report]
        patches.append(encoder(batch[IMAGE][chosen]).patches.half().cpu())
        texts += [batch[REPORT][number] for number in chosen]
    return torch.cat(patches), texts
