"""Rankings written down as their definitions: whole matrices, full sorts, Python loops."""

import numpy as np


def retrieval_ranks(scores: np.ndarray, right: list[set[int]]) -> list[int]:
    """Place of the first right candidate in a stable descending sort of each row of ``scores`` (Q, P)."""
    ranks = []
    for row, wanted in zip(scores, right, strict=True):
        order = np.argsort(-row, kind="stable").tolist()
        ranks.append(min(order.index(candidate) for candidate in wanted))
    return ranks


def knn_votes(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, classes: int, k: int, temperature: float
) -> np.ndarray:
    votes = np.zeros((len(test), classes))
    for row, x in enumerate(test):
        similarity = train @ x
        for neighbour in np.argsort(-similarity)[:k]:
            votes[row, train_labels[neighbour]] += np.exp(similarity[neighbour] / temperature)
    return votes
