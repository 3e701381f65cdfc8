"""The parts against the official order of operations, loops and independent libraries."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datamodules.transforms.sound import cut_clip
from experiments.benchmarks.reference import avgn as plain
from models.avgn import losses
from models.avgn.audio import LogMel, LogSTFT
from models.avgn.classifier import CumulativeClassifier
from models.avgn.exits import NEVER, apply_exit, exit_confidence, exit_thresholds
from models.avgn.policy import crop_patches
from models.avgn.saliency import AVTeST, gumbel, top_snippets, uniform_snippets


@pytest.mark.parametrize("size", [1, 12, 23, 24])
def test_crop_is_the_official_one_with_both_gradients(size):
    torch.manual_seed(0)
    actions = torch.cat([torch.rand(4, 2), torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.999, 0.5]])])
    found = []
    for crop in (crop_patches, plain.crop_patches):
        frames = torch.rand(7, 3, 24, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        place = actions.clone().requires_grad_()
        patches = crop(frames, place, size)
        (patches * torch.linspace(-1, 1, patches.numel()).reshape(patches.shape)).sum().backward()
        # At the very border the slope of a bilinear picture has two values; inside both sides agree.
        found.append((patches, frames.grad, torch.zeros(4, 2) if size == 24 else place.grad[:4]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_crop_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="no patch of side 9"):
        crop_patches(torch.zeros(1, 3, 8, 8), torch.zeros(1, 2), 9)


def test_classifier_is_the_loop_and_goes_step_by_step():
    classifier = CumulativeClassifier(6, 5, 4, width=9).eval()
    features = torch.randn(3, 4, 6)
    states = classifier.mlp(features.flatten(0, 1)).unflatten(0, (3, 4))
    expected = plain.step_logits(states, classifier.heads.weight, classifier.heads.bias)
    torch.testing.assert_close(classifier(features), expected)
    torch.testing.assert_close(classifier(features[:, :2]), expected[:, :2])
    state = None
    for step in range(4):
        logits, state = classifier.step(features[:, step], step, state)
        torch.testing.assert_close(logits, expected[:, step])


@pytest.mark.parametrize("criterion", ["confidence", "entropy"])
@pytest.mark.parametrize("p", [0.5, 1.0, 2.3, 3.9])
def test_exit_thresholds_are_those_of_the_loops(criterion, p):
    confidence = exit_confidence(torch.randn(5, 83, 7, generator=torch.Generator().manual_seed(3)), criterion)
    torch.testing.assert_close(exit_thresholds(confidence, p), plain.exit_thresholds(confidence, p))


def test_exit_takes_the_first_step_that_is_sure():
    logits = torch.tensor([[[0.0, 1.0], [0.0, 5.0]], [[3.0, 0.0], [9.0, 0.0]]])  # 2 steps, 2 videos
    left = apply_exit(logits, torch.tensor([4.0, -1e8]), "confidence")
    assert left.steps.tolist() == [1, 0] and left.counts.tolist() == [1, 1]
    assert left.logits.tolist() == [[3.0, 0.0], [0.0, 5.0]]
    assert apply_exit(logits, torch.tensor([NEVER, -1e8]), "entropy").steps.tolist() == [1, 1]


def test_snippets_are_chosen_in_the_order_asked_for_and_ties_by_index():
    scores = torch.tensor([[0.0, 2.0, 2.0, -torch.inf, 5.0]])
    assert top_snippets(scores, 3, "saliency").tolist() == [[4, 1, 2]]
    assert top_snippets(scores, 3, "temporal").tolist() == [[1, 2, 4]]
    assert top_snippets(torch.zeros(1, 6), 2).tolist() == [[0, 1]]
    assert uniform_snippets(1, 16, 4).tolist() == [[2, 6, 10, 14]]
    assert uniform_snippets(1, 5, 5).tolist() == [[0, 1, 2, 3, 4]]


def test_gumbel_draws_from_the_softmax():
    torch.manual_seed(0)
    scores = torch.tensor([0.0, 1.0, 2.0])
    first = gumbel(scores.expand(20000, 3)).argmax(dim=1)
    share = torch.bincount(first, minlength=3) / 20000
    torch.testing.assert_close(share, scores.softmax(0), rtol=0, atol=0.015)


def test_avtest_starts_indifferent_and_handles_length_and_ignored_keys():
    torch.manual_seed(0)
    model = AVTeST(4, 3, dim=16, max_snippets=6).eval()
    visual, audio = torch.randn(2, 9, 4), torch.randn(2, 9, 3)
    assert bool((model(visual, audio).logits == 0).all())
    torch.nn.init.normal_(model.head[2].weight)
    ignored = torch.arange(9)[None] >= torch.tensor([[9], [5]])
    ignore = torch.cat([ignored, ignored], dim=1)
    logits = model(visual, audio, ignore).logits
    assert bool(torch.isfinite(logits).all())
    other = torch.where(ignored[..., None], 7.0, visual)
    torch.testing.assert_close(model(other, audio, ignore).logits[1, :5], logits[1, :5])


def test_saliency_losses_are_their_formulas():
    draw = torch.Generator().manual_seed(0)
    teacher, scores = torch.randn(2, 4, 3, generator=draw), torch.randn(2, 4, generator=draw)
    labels = torch.tensor([[1, 0, 1], [0, 1, 0]])
    confidence = losses.snippet_confidence(teacher, labels)
    assert float(confidence[0, 2]) == pytest.approx(float(teacher[0, 2].softmax(0)[[0, 2]].mean()), rel=1e-5)
    for temperature in (0.5, 1.0, 3.0):
        raised = (confidence.double() + 1e-8) ** (1 / temperature)
        target = losses.saliency_target(confidence, temperature)
        torch.testing.assert_close(target.double(), raised / raised.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
        expected = F.kl_div(scores.log_softmax(1), target, reduction="batchmean")
        torch.testing.assert_close(losses.saliency_kl(scores, target), expected)
    pairs = [
        max(0.0, 0.1 - float(scores[b, i] - scores[b, j]))
        for b in range(2) for i in range(4) for j in range(4) if confidence[b, i] > confidence[b, j]
    ]  # fmt: skip
    assert float(losses.saliency_rank(scores, confidence)) == pytest.approx(sum(pairs) / len(pairs), rel=1e-5)
    perfect = torch.where(confidence == confidence.amax(1, keepdim=True), 50.0, -50.0)
    assert float(losses.saliency_bce(perfect, (perfect > 0).float())) < 1e-6


def test_padding_does_not_break_the_divergence():
    scores = torch.tensor([[1.0, 2.0, -torch.inf]])
    assert math.isfinite(losses.saliency_kl(scores, torch.tensor([[0.25, 0.75, 0.0]])))


def test_clips_stay_inside_and_short_sounds_repeat():
    wave = np.arange(1000, dtype=np.float32)
    assert cut_clip(wave, 0.1, 0.5, 100).tolist() == list(range(50))
    assert cut_clip(wave, 9.9, 0.5, 100).tolist() == list(range(950, 1000))
    assert cut_clip(wave, 5.0, 0.5, 100).tolist() == list(range(475, 525))
    assert cut_clip(wave[:20], 0.1, 0.5, 100).tolist() == [*range(20), *range(20), *range(10)]
    with pytest.raises(ValueError, match="empty"):
        cut_clip(wave[:0], 0, 0.5, 100)


def test_front_ends_have_the_documented_shapes_and_statistics():
    wave = torch.randn(3, 20480) * 0.1
    mel = LogMel()
    assert mel(wave).shape == (3, 64, 128)
    assert LogSTFT()(torch.randn(2, 30720)).shape == (2, 256, 256)
    mel.measure(wave)
    assert float(mel(wave).mean()) == pytest.approx(0, abs=1e-4) and float(mel(wave).std()) == pytest.approx(1, abs=1e-3)
    assert {"mean", "std"} == set(mel.state_dict())
