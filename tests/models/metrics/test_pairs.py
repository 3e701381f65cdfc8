"""Winoground and MMVP: benchmarks of image pairs."""

import torch

from models.metrics.compositional import mmvp_accuracy, winoground_correct


def test_winoground_definition():
    scores = torch.tensor(
        [
            [[2.0, 1.0], [1.0, 2.0]],  # everything right
            [[2.0, 3.0], [1.0, 4.0]],  # right text for each image, wrong image for caption 0
            [[2.0, 1.0], [3.0, 4.0]],  # right image for each caption, wrong text for image 0
            [[1.0, 1.0], [1.0, 1.0]],  # ties are wrong
        ]
    )
    assert winoground_correct(scores).tolist() == [[True] * 3, [True, False, False], [False, True, False], [False] * 3]


def test_mmvp_counts_pairs_with_both_statements_right():
    right, wrong = [[2.0, 1.0], [0.0, 5.0]], [[2.0, 1.0], [5.0, 0.0]]
    logits = torch.tensor([right, right, wrong, right, wrong])
    ids = torch.tensor([[1, 2], [4, 3], [1, 2], [5, 6], [7, 8]])
    accuracy = mmvp_accuracy(logits, ids, pairs_per_category=2)
    assert accuracy.tolist() == [50.0, 50.0, 0.0]


def test_mmvp_ties_choose_the_second_image():
    tie = torch.zeros(1, 2, 2)
    assert mmvp_accuracy(tie, torch.tensor([[2, 4]]), 1).tolist() == [100.0]
    assert mmvp_accuracy(tie, torch.tensor([[1, 2]]), 1).tolist() == [0.0]
