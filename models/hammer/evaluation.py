"""From predictions of many batches to the numbers of DGM4's evaluation and, beside them, those without its quirks."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from models.hammer.metrics import (
    binary_metrics,
    box_metrics,
    grounding_iou,
    multi_label_metrics,
    token_metrics,
)
from models.metrics.average_precision import average_precision

KINDS = ("FS", "FA", "TS", "TA")  # face swap, face attribute, text swap, text attribute


def dgm4_metrics(found: Mapping[str, Tensor]) -> dict[str, float]:
    """Percent, by flat name, of the rows of a split; groups whose prediction is absent are left out.

    Args:
        found: 'real_fake' (N, 2) and 'multi_label' (N, 4) logits, 'box' (N, 4), 'token' (N, T) predicted classes; the
            truths 'fake' (N,), 'labels' (N, 4), 'target_box' (N, 4) of zeros where there is none, 'token_labels' (N, T).
    """
    out: dict[str, float] = {}
    binary = binary_metrics(found["real_fake"], found["fake"])
    out |= {"binary/auc": binary.auc, "binary/eer": binary.eer, "binary/acc": binary.accuracy}
    labels, logits = found["labels"], found["multi_label"]
    precision, kinds = average_precision(logits, labels == 1), multi_label_metrics(logits, labels)
    out |= {"kinds/map": float(precision.mean()) / 100, "kinds/cf1": kinds.cf1, "kinds/of1": kinds.of1}
    out |= {"kinds/macro_f1": kinds.macro_f1}
    out |= {f"kinds/f1_{name}": float(value) for name, value in zip(KINDS, kinds.class_f1, strict=True)}
    if "box" in found:
        target = found["target_box"]
        official = box_metrics(grounding_iou(found["box"], target))
        boxed = (target != 0).any(dim=1)
        own = box_metrics(grounding_iou(found["box"][boxed], target[boxed], official_empty_rule=False))
        out |= {"box/iou_mean": official.mean, "box/iou50": official.iou50, "box/iou75": official.iou75}
        out |= {"box/boxed_iou_mean": own.mean, "box/boxed_iou50": own.iou50, "box/boxed_iou75": own.iou75}
    if "token" in found:
        tokens = token_metrics(found["token"], found["token_labels"])
        out |= {"token/precision": tokens.precision, "token/recall": tokens.recall, "token/f1": tokens.f1}
        out |= {"token/acc": tokens.accuracy}
    return {name: 100 * value for name, value in out.items()}
