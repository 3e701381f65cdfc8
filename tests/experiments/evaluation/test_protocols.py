"""Suites on a stand-in that follows the protocols and nothing else: what a new family gets without a suite of its own."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.evaluation.base import TrainedSplit
from experiments.evaluation.multiple_choice import multiple_choice
from experiments.evaluation.question_answering import question_answering
from experiments.evaluation.retrieval import _candidates, pair_retrieval
from models.batch import INDEX, SKIPPED
from models.errors import UserError

IMAGES, CAPTIONS, WIDTH = 11, 2, 4


class TwoTower(nn.Module):
    """Images with two captions each: a noisy dual encoder, and a fused model that knows the pairs."""

    medium, device = "image", torch.device("cpu")
    embeds_pairs, scores_pairs = True, True

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.image = torch.randn(IMAGES, WIDTH, generator=generator)
        noise = torch.randn(IMAGES, CAPTIONS, WIDTH, generator=generator)
        self.text = self.image[:, None] + noise

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch

    def pair_inputs(self, batch):
        rows = batch[INDEX]
        owner = torch.arange(len(rows)).repeat_interleave(CAPTIONS)
        texts = {"vector": self.text[rows].flatten(0, 1), "image": rows[owner]}
        return texts, {"vector": self.image[rows], "image": rows}, owner

    def embed_texts(self, texts):
        return texts["vector"]

    def embed_media(self, media):
        return media["vector"]

    def score_pairs(self, texts, medium):
        assert len(medium["image"]) == 1
        return (texts["image"] == medium["image"]) + 0.01 * texts["vector"][:, 0]  # no ties between captions

    def predict_step(self, batch, batch_idx=0):
        rows = batch[INDEX]
        return {INDEX: rows, "answer_predicted": rows % 3, "answer_score": rows.double() / 10, **self.choices(rows)}

    def choices(self, rows):
        options = torch.full_like(rows, 3)
        return {"choice_predicted": rows % 3, "choice_labels": torch.zeros_like(rows), "choice_options": options}


class Data:
    def __init__(self):
        question = SimpleNamespace(texts=("first", "second"), answer=0, group="")
        split = SimpleNamespace(samples=[question] * IMAGES, answers=("a", "b", "c"), fingerprint="x", display=None)
        self.splits = {"test": split}

    def report_skipped(self, split, skipped):
        assert not skipped

    def evaluation_dataloader(self, split):
        return [{INDEX: part, SKIPPED: []} for part in torch.arange(IMAGES).split(4)]


@pytest.fixture
def split():
    return TrainedSplit(TwoTower(), Data(), "test")


@torch.inference_mode()
def test_dual_encoder_with_several_captions(split):
    found = pair_retrieval(split, ks=[1, 5])
    module = split.module
    scores = F.normalize(module.text.flatten(0, 1), dim=1) @ F.normalize(module.image, dim=1).T
    owner = torch.arange(IMAGES).repeat_interleave(CAPTIONS)
    right = (scores.argmax(dim=1) == owner).double().mean().item()
    assert found.metrics["retrieval/t2i_recall@1"] == pytest.approx(100 * right)
    best = scores.topk(5, dim=0).indices  # of each image
    hit = (owner[best] == torch.arange(IMAGES)).any(dim=0).double().mean().item()
    assert found.metrics["retrieval/i2t_recall@5"] == pytest.approx(100 * hit)
    assert found.baselines["chance"]["retrieval/t2i_recall@1"] == pytest.approx(100 / IMAGES)
    assert found.baselines["chance"]["retrieval/i2t_recall@1"] == pytest.approx(100 * CAPTIONS / (IMAGES * CAPTIONS))


@torch.inference_mode()
def test_reranking_finds_what_stands_among_the_candidates(split):
    plain, better = pair_retrieval(split, ks=[1, 4]).metrics, pair_retrieval(split, ks=[1], rerank=4).metrics
    assert better["reranked/t2i_recall@1"] >= plain["retrieval/t2i_recall@4"]
    assert better["reranked/i2t_recall@1"] >= plain["retrieval/i2t_recall@4"]
    assert pair_retrieval(split, ks=[1], rerank=100).metrics["reranked/t2i_recall@1"] == 100


def test_candidates_are_the_best_of_both_sides():
    scores = torch.tensor([[3.0, 0, 0], [2, 1, 0], [1, 0, 5]])
    assert _candidates(scores, 1).tolist() == [[True, False, False], [True, True, False], [False, False, True]]


@torch.inference_mode()
def test_fused_model_alone(split):
    split.module.embeds_pairs = False
    found = pair_retrieval(split, ks=[1])
    assert found.metrics["fused/t2i_recall@1"] == found.metrics["fused/any_hit_recall@1"] == 100
    split.module.scores_pairs = False
    with pytest.raises(UserError, match="neither a dual encoder"):
        pair_retrieval(split)


@torch.inference_mode()
def test_embeddings_and_scores_that_are_not_finite(split):
    split.module.text[2, 0, 0] = float("nan")
    with pytest.raises(UserError, match="embeddings are not finite"):
        pair_retrieval(split)


@torch.inference_mode()
def test_answers_with_soft_targets(split):
    metrics = question_answering(split).metrics
    assert metrics == {"answer/score": pytest.approx(100 * sum(range(IMAGES)) / 10 / IMAGES)}


@torch.inference_mode()
def test_choices_stand_beside_chance_and_the_commonest(split):
    found = multiple_choice(split)
    assert found.metrics["choice/accuracy"] == pytest.approx(100 * 4 / IMAGES)  # rows 0, 3, 6, 9
    assert found.baselines["chance"]["choice/accuracy"] == pytest.approx(100 / 3)
    assert found.baselines["majority"]["choice/accuracy"] == 100


def test_predictions_that_a_suite_needs_are_named(split):
    split.module.predict_step = lambda batch: {INDEX: batch[INDEX]}
    with pytest.raises(UserError, match="needs the predictions .*choice_predicted"):
        multiple_choice(split)
