"""Weighted k-nearest-neighbour classification of the frozen image features (DINO's protocol; SAIL part I)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from experiments.evaluation.base import EmbeddedSplit, SuiteResult
from models.metrics.classification import top_k_accuracy
from models.metrics.knn import knn_votes


def knn(split: EmbeddedSplit, ks: Sequence[int] = (10, 20, 100, 200), temperature: float = 0.07) -> SuiteResult:
    """Top-1 accuracy in percent for each of ``ks`` neighbours from the split ``train``, beside its most frequent class.

    The features are the encoder's, before any projector: how good the frozen space is to begin with. Left out with a note
    where the data has no classes.
    """
    labelled = split.labels is not None and bool((split.labels >= 0).any())
    train, train_labels = split.labelled_features("train") if labelled and split.labelled_features else (None, None)
    if train is None or not bool((train_labels >= 0).any()):
        return SuiteResult(notes=["k-NN left out: it needs classes in the train split and in the split that is judged."])
    train, train_labels = F.normalize(train[train_labels >= 0].float(), dim=-1), train_labels[train_labels >= 0]
    num_classes = len(split.class_names)
    test, labels = split.labelled_features(split.name)
    test, labels = F.normalize(test[labels >= 0].float(), dim=-1), labels[labels >= 0]
    metrics = {}
    for k in ks:
        metrics[f"knn/top1@{k}"] = top_k_accuracy(knn_votes(train, train_labels, test, num_classes, k, temperature), labels, 1)
    majority = torch.bincount(train_labels, minlength=num_classes).argmax()
    share = 100 * (labels == majority).double().mean().item()
    notes = []
    if max(ks) > len(train):
        notes.append(f"k-NN: the train split has {len(train)} labelled images; with k={max(ks)} all of them vote.")
    return SuiteResult(metrics, {"most frequent class": dict.fromkeys(metrics, share)}, dict(split.hashes), notes)
