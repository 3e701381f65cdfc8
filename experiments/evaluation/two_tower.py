"""What the two-tower models are judged on: questions, retrieval in two stages, and the cost of a pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from experiments.evaluation.base import SuiteResult, TrainedSplit, spread
from experiments.evaluation.errors import ErrorRow, strip, wrong_retrievals
from experiments.evaluation.question_answering import question_answering
from experiments.figures import clips, two_tower
from models import batch as keys
from models.losses.gather import GradientScope
from models.metrics.answers import answer_metrics, percent
from models.metrics.retrieval import chance_recall_at
from models.metrics.video_retrieval import pair_ranks, text_to_video_ranks
from models.two_tower import objectives
from models.two_tower.attention import image_attention, manager_weights
from models.two_tower.batch import CAPTION_OWNER, MEDIUM, QUESTION_IDS, QUESTION_MASK
from models.two_tower.cost import multiply_adds
from models.two_tower.managers import Managers
from models.two_tower.model import TwoTower
from models.two_tower.retrieval import PairScorer, candidates, recalls

EXAMPLES = 6  # captions that are drawn


def questions(split: TrainedSplit) -> SuiteResult:
    """:func:`~experiments.evaluation.question_answering.question_answering`, and a second baseline.

    ``question alone`` gives the commonest training answer to this very question: what a model of the text alone would learn.
    """
    result = question_answering(split)
    rows = split.rows("answer_predicted")
    samples = [split.dataset.samples[row] for row in rows["index"].tolist()]
    known = _commonest_by_question(split.data.splits.get("train", split.dataset).samples)
    guesses = torch.tensor([known.get(sample.question, known[""]) for sample in samples])
    if isinstance(split.module.model, TwoTower):
        result.figures |= _figures(split)
    alone = answer_metrics({"answer_predicted": guesses, "answer_labels": rows["answer_labels"]})
    for kind in {sample.group for sample in samples}:
        if f"answer/{kind}_accuracy" in result.metrics:
            of_kind = torch.tensor([sample.group == kind for sample in samples])
            alone[f"answer/{kind}_accuracy"] = percent(guesses[of_kind] == rows["answer_labels"][of_kind])
    result.baselines["question alone"] = alone
    return result


def _figures(split: TrainedSplit) -> dict[str, Any]:
    """Attention over the images of some questions and, of a model with managers, their weights over a batch."""
    model, batch = split.module.model, next(split.batches())
    encodings = split.module.encodings(batch)
    text, image = encodings("question"), encodings("image")
    answers, names = objectives.answer_logits(model, text, image).argmax(dim=1).tolist(), split.dataset.answers
    maps, rows = image_attention(model, text, image).cpu(), batch[keys.INDEX].tolist()
    examples = [
        {
            "image": split.dataset.display(rows[i])[0],
            "text": split.dataset.samples[rows[i]].question,
            "said": names[answers[i]] if answers[i] < len(names) else f"class {answers[i]}",
            "map": maps[i],
        }
        for i in range(min(EXAMPLES, len(rows)))
    ]
    drawn: dict[str, Any] = {"attention": partial(two_tower.attention, examples)}
    if isinstance(model.connector, Managers):
        drawn["manager_weights"] = partial(two_tower.manager_weights, manager_weights(model, text, image))
    return drawn


def _commonest_by_question(samples: Sequence[Any]) -> dict[str, int]:
    """The commonest answer to each question, and under "" to all."""
    counts: dict[str, Counter[int]] = {"": Counter()}
    for sample in samples:
        for question in ("", sample.question):
            counts.setdefault(question, Counter())[sample.answer] += 1
    return {question: answers.most_common(1)[0][0] for question, answers in counts.items()}


def reranked_retrieval(
    split: TrainedSplit, ks: Sequence[int] = (1, 5, 10), rerank: int = 32, batch_size: int = 64
) -> SuiteResult:
    """Recalls at ``ks`` (percent) of the contrastive space (``retrieval/...``, with median and mean rank), and after the fused
    model has scored the best candidates again (``reranked/...``); BridgeTower, section 4.3. A model of the task ``rank``
    without a contrastive space scores every pair (``fused/...``).

    Args:
        split: a module with the tasks ``contrastive`` and, to re-rank, ``match``; or with ``rank``.
        ks: of the recalls.
        rerank: candidates of each text and of each image that are scored; officially 128 for Flickr30k, 256 for COCO; 0: none.
        batch_size: pairs per fused forward pass.

    Ties go to the right candidate in ``retrieval/...`` (see :func:`~models.metrics.video_retrieval.pair_ranks`).
    """
    module, model = split.module, split.module.model
    for task in {"contrastive", "match", "rank"} & set(module.tasks):
        module.check_trained(task)
    texts = _Texts(split)
    metrics: dict[str, float] = {}
    chance: dict[str, float] = {}
    examples: list[dict] = []
    if "contrastive" in module.tasks:
        vectors = [model.embed_image(model.encode_image(batch[keys.IMAGE])).cpu() for batch in split.batches(by_image=True)]
        similarity = torch.cat(vectors) @ model.embed_text(texts.encoded).cpu().T  # (images, texts)
        metrics |= {f"retrieval/{name}": v for name, v in pair_ranks(similarity.T, texts.owner, ks, letter="i").items()}
        chance |= _chance("retrieval", texts.owner, len(texts.rows), ks)
        examples = texts.examples(similarity)
        chosen, name = torch.stack(candidates(similarity, rerank)).any(dim=0), "reranked"
    else:
        chosen, name = torch.ones(len(texts.rows), len(texts.owner), dtype=torch.bool), "fused"
    if {"match", "rank"} & set(module.tasks) and bool(chosen.any()):
        scorer, parts = PairScorer(model, texts.encoded, batch_size), iter(chosen)
        scores = torch.cat([_scored(scorer, model, batch[keys.IMAGE], parts) for batch in split.batches(by_image=True)])
        metrics |= {f"{name}/{key}": value for key, value in recalls(scores, texts.owner, tuple(ks)).items()}
        chance |= _chance(name, texts.owner, len(texts.rows), ks)
    figures = {"retrieved_images": partial(clips.retrieved, examples, split.dataset.display)} if examples else {}
    errors = {"retrieval": texts.errors(similarity)} if examples else {}
    return SuiteResult(metrics, {"chance": chance}, split.hashes, figures=figures, errors=errors)


class _Texts:
    """All captions of a split, encoded; ``owner`` (M,): the image of each; ``rows``: the row of each image in the split."""

    def __init__(self, split: TrainedSplit):
        images = split.dataset.by_image()
        self.rows: list[int] = []
        texts, owner = [], []
        captions: list[str] = []
        for batch in split.batches(by_image=True):
            owner.append(batch[CAPTION_OWNER].cpu() + len(self.rows))
            read = batch[keys.INDEX].tolist()
            self.rows += [images.first[i] for i in read]
            captions += [caption for i in read for caption in images.captions[i]]
            texts.append(split.module.encodings(batch)("all_captions"))
        self.owner, self.captions = torch.cat(owner), captions
        self.encoded = objectives.join(*texts)
        self._display = split.dataset.display

    def errors(self, similarity: Tensor) -> list[ErrorRow]:
        """The captions whose own image ranks last, of similarities (images, texts)."""
        return wrong_retrievals(
            text_to_video_ranks(similarity.T, self.owner),
            self.owner,
            lambda text: int(similarity[:, text].argmax()),
            self.captions.__getitem__,
            lambda image: strip(self._display(self.rows[image])),
        )

    def examples(self, similarity: Tensor) -> list[dict]:
        """Captions with the images that fit them best."""
        best = similarity.topk(min(4, len(similarity)), dim=0).indices.T
        return [
            {"text": self.captions[i], "right": self.rows[self.owner[i]], "rows": [self.rows[j] for j in best[i].tolist()]}
            for i in spread(EXAMPLES, len(self.captions))
        ]


def _scored(scorer: PairScorer, model: Any, images: Tensor, chosen: Iterator[Tensor]) -> Tensor:
    """(B, texts) scores of the next B rows of ``chosen`` pairs."""
    return scorer(model.encode_image(images), torch.stack(list(islice(chosen, len(images)))))


def _chance(name: str, owner: Tensor, images: int, ks: Sequence[int]) -> dict[str, float]:
    texts = torch.bincount(owner, minlength=images)
    chance = {f"{name}/i2t_recall@{k}": chance_recall_at(k, len(owner), texts) for k in ks}
    return chance | {f"{name}/t2i_recall@{k}": chance_recall_at(k, images, torch.ones(1)) for k in ks}


def hard_negatives(split: TrainedSplit) -> SuiteResult:
    """A figure of the negatives that the matching task draws in a training batch, with their cosines; nothing for a module that
    does not draw any, or without training data."""
    module, model, data = split.module, split.module.model, split.data
    if module.negatives != "hard" or "match" not in module.tasks or "train" not in data.splits:
        return SuiteResult({})
    batch = module.transfer_batch_to_device(next(iter(data.train_dataloader())), module.device, 0)
    encodings = module.encodings(batch)
    medium = batch[MEDIUM] if module.soft_targets else None
    contrast = objectives.contrastive(model, encodings("caption"), encodings("image"), medium, GradientScope.RANK)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        images, texts = (objectives.draw_negatives(part.cpu()).tolist() for part in objectives.negative_weights(contrast))
    cosines, dataset, rows = (contrast.text @ contrast.image.T).cpu(), data.splits["train"], batch[keys.INDEX].tolist()

    captions = data.words.tokenizer.batch_decode(batch[keys.TOKEN_IDS], skip_special_tokens=True)

    def example(i: int) -> dict:
        return {
            "image": dataset.display(rows[i])[0],
            "other_image": dataset.display(rows[images[i]])[0],
            "text": captions[i],
            "other_text": captions[texts[i]],
            "cosine": cosines[i, i],
            "image_cosine": cosines[i, images[i]],
            "text_cosine": cosines[texts[i], i],
        }

    examples = [example(i) for i in range(min(EXAMPLES, len(rows)))]
    return SuiteResult({}, figures={"hard_negatives": partial(two_tower.hard_negatives, examples)})


def cost(split: TrainedSplit) -> SuiteResult:
    """Parameters in millions, and GFLOPs of an image with the longest text of a batch (a multiply-add is two)."""
    model = split.module.model
    batch = next(split.batches())
    mask = batch[QUESTION_MASK] if QUESTION_IDS in batch else batch[keys.TOKEN_MASK]
    flops = 2 * multiply_adds(model, int(mask.sum(dim=1).max()))
    count = sum(p.numel() for p in model.parameters())
    return SuiteResult({"cost/gflops_per_pair": flops / 1e9, "cost/parameters_m": count / 1e6}, hashes=split.hashes)
