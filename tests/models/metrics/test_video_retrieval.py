"""Ranks with ties against a slow reference by sorting, and scikit-learn's top-k accuracy."""

import numpy as np
import torch
from sklearn.metrics import top_k_accuracy_score

from models.metrics.video_retrieval import any_hit_recall, rank_summary, text_to_video_ranks, video_to_text_ranks


def test_recall_is_top_k_accuracy():
    torch.manual_seed(0)
    scores, owner = torch.randn(30, 30), torch.arange(30)
    found = rank_summary(text_to_video_ranks(scores, owner), [1, 5])
    for k in (1, 5):
        expected = top_k_accuracy_score(owner.numpy(), scores.numpy(), k=k, labels=np.arange(30)) * 100
        assert abs(found[f"recall@{k}"] - expected) < 1e-4
    right = torch.eye(30, dtype=torch.bool)
    assert abs(any_hit_recall(scores, right, 5) * 100 - found["recall@5"]) < 1e-4


def test_ties():
    scores = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.5]])
    owner = torch.tensor([0, 1, 0])
    assert text_to_video_ranks(scores, owner).tolist() == [0, 0, 0]  # a tie favours the text
    assert video_to_text_ranks(scores, owner).tolist() == [0.5, 0.5]  # and is averaged for the video
    found = rank_summary(video_to_text_ranks(scores, owner), [1, 5])
    assert found["recall@1"] == 0 and found["recall@5"] == 100 and found["median_rank"] == 1.5


def test_scores_that_are_no_numbers_rank_last():
    scores = torch.full((4, 4), float("nan"))
    assert text_to_video_ranks(scores, torch.arange(4)).tolist() == [3] * 4
    assert video_to_text_ranks(scores, torch.arange(4)).tolist() == [3] * 4
