"""The training step of every task, parameter groups, linear evaluation, and a resumed run."""

from functools import partial

import pytest
import torch

from experiments.evaluation.base import TrainedSplit
from experiments.evaluation.multiple_choice import multiple_choice
from experiments.evaluation.pretraining import pretraining
from experiments.evaluation.question_answering import question_answering
from experiments.evaluation.retrieval import pair_retrieval
from lightning_modules.all_in_one import AllInOneModule
from models import batch as keys
from models.all_in_one.batch import FALSE_VIDEO, IMAGES, REASON, REASON_IDS, REASON_MASK
from models.all_in_one.model import AllInOne
from models.errors import UserError

SMALL = partial(
    AllInOne, width=32, depth=2, heads=2, patch_size=8, image_size=16, text_length=8, frames=3, init_std=0.2, embed_dim=8
)
TASKS = {
    "match": {"match", "align"},
    "mlm": {"mlm"},
    "contrastive": {"contrastive"},
    "rank": {"rank"},
    "answer": {"answer"},
    "option": {"option"},
    "choice": {"choice"},
    "reason": {"reason", "reason_why"},
}


def module(*tasks, **settings) -> AllInOneModule:
    torch.manual_seed(0)
    return AllInOneModule(SMALL, tasks, vocab_size=40, num_answers=6 if "answer" in tasks else None, **settings)


def batch(size=4, frames=3) -> dict:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 40, (size, 8), generator=generator)
    options = torch.randint(5, 40, (size, 3, 8), generator=generator)
    labels = torch.full_like(ids, -100)
    labels[:, 2] = ids[:, 2]
    return {
        keys.INDEX: torch.arange(size),
        keys.VIDEO: torch.randn(size, frames, 3, 16, 16, generator=generator),
        FALSE_VIDEO: torch.randn(size // 2, frames, 3, 16, 16, generator=generator),
        keys.MATCHED: torch.tensor([1, 0] * (size // 2)),
        keys.TOKEN_IDS: ids,
        keys.TOKEN_MASK: torch.ones_like(ids),
        keys.MASKED_IDS: ids,
        keys.MASKED_LABELS: labels,
        keys.CANDIDATE_IDS: options,
        keys.CANDIDATE_MASK: torch.ones_like(options),
        REASON_IDS: options.flip(1),
        REASON_MASK: torch.ones_like(options),
        keys.ANSWER: torch.tensor([0, 1, 2, -100])[:size],
        REASON: torch.tensor([2, 1, 0, 1])[:size],
    }


@pytest.mark.parametrize("task", TASKS)
def test_every_task_trains_every_parameter_it_is_given(task):
    built = module(task).train()
    step = built.shared_step(batch(), "train")
    assert step.losses.keys() == TASKS[task]
    sum(step.losses.values()).backward()
    # padding row aside, a parameter without gradient would stop DDP
    left_out = [name for name, p in built.named_parameters() if p.requires_grad and p.grad is None]
    assert not left_out


def test_losses_add_up_over_tasks_and_streams():
    built = module("match", "mlm").eval()
    clips, images = batch(), batch(frames=1)
    together = built.shared_step({**clips, IMAGES: images}, "val").losses
    alone = built.shared_step(clips, "val").losses
    assert together.keys() == {"match", "align", "mlm", "image_match", "image_align", "image_mlm"}
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value)


def test_images_of_co_training_get_no_time_vector():
    built = module("mlm").train()
    images = {**batch(), IMAGES: batch(frames=1)}
    losses = built.shared_step(images, "train").losses
    losses["image_mlm"].backward()
    assert built.model.transformer.temporal_embed.grad is None
    assert built.model.transformer.pos_embed.grad.abs().max() > 0


def test_groups_follow_the_official_names():
    built = module("answer", head_lr_scale=10.0)
    names = {id(p): name for name, p in built.named_parameters()}
    groups = {(g.get("weight_decay"), g.get("lr_scale")): {names[id(p)] for p in g["params"]} for g in built.parameter_groups()}
    assert "model.vqa_classifier.2.weight" in groups[None, 10.0]  # a LayerNorm that decays: official
    assert "model.vqa_classifier.4.bias" in groups[0.0, 10.0]
    assert {"model.transformer.pos_embed", "model.transformer.cls_token"} <= groups[None, None]
    assert {"model.transformer.norm.weight", "model.text_embeddings.LayerNorm.weight"} <= groups[0.0, None]


def test_linear_evaluation_freezes_the_backbone():
    quiet, official = module("answer", linear=True), module("answer", linear=True, frozen_dropout=True)
    for built in (quiet.train(), official.train()):
        trained = {name.split(".")[1] for name, p in built.named_parameters() if p.requires_grad}
        assert trained == {"pooler", "vqa_classifier"}
    assert not quiet.model.transformer.training and official.model.transformer.training


def test_score_is_the_official_sum_and_leaves_unknown_answers_out():
    rows = {"answer_predicted": torch.arange(4), "answer_labels": torch.tensor([0, 2, -100, 3])}
    rows |= {"text": torch.eye(4), "media": torch.eye(4)}
    metrics = module("answer").validation_metrics(rows)
    assert metrics["answer/accuracy"] == 50 and metrics["answer/filtered_accuracy"] == pytest.approx(200 / 3)
    assert metrics["score"] == pytest.approx(200 / 3 + 100 + 100)


def test_training_reports_accuracy_of_known_targets():
    built = module("mlm", "answer").eval()
    report = built.shared_step(batch(), "train").report
    rows = built.predict_step(batch())
    known = rows["answer_labels"] != -100
    hits = (rows["answer_predicted"] == rows["answer_labels"])[known]
    assert float(report["answer/accuracy"]) == pytest.approx(100 * hits.float().mean().item())
    assert rows["mlm_predicted"].shape == rows["mlm_labels"].shape
    assert ((rows["mlm_predicted"] == -100) == (rows["mlm_labels"] == -100)).all()


def test_fine_tuning_from_another_task_and_judging_a_fresh_head():
    pretrained, tuned = module("match", "mlm"), module("answer")
    assert tuned.load_pretrained(pretrained.state_dict())
    assert torch.equal(tuned.model.transformer.cls_token, pretrained.model.transformer.cls_token)
    with pytest.raises(UserError, match="no trained head"):
        question_answering(TrainedSplit(tuned, _Data(), "test"))
    zero_shot = module("choice")
    zero_shot.load_pretrained(pretrained.state_dict())
    assert zero_shot.fresh_heads == []  # the matching head scores


def test_unknown_task_is_named():
    with pytest.raises(UserError, match="matching"):
        module("matching")


# ---- suites on a stub of a datamodule, against direct computation -------------------------------------------------------


class _Split:
    fingerprint, answers = "x", tuple("abcdef")

    def display(self, row):
        raise AssertionError("figures are drawn later")

    def __init__(self, count, texts):
        from datamodules.readers.clip import ClipSource
        from datamodules.readers.video_annotations.sample import Sample

        self.samples = [Sample(str(i), ClipSource(""), texts, i % 3, texts, 0) for i in range(count)]


class _Data:
    def __init__(self, texts=("t",)):
        self.splits = {"test": _Split(4, texts)}

    def report_skipped(self, split, skipped):
        assert not skipped

    def evaluation_dataloader(self, split, view=0):
        whole = batch()
        if view:
            whole[keys.VIDEO] = whole[keys.VIDEO] + view
        for half in (slice(0, 2), slice(2, 4)):
            part = {name: value[half] for name, value in whole.items() if name != FALSE_VIDEO}
            yield {**part, FALSE_VIDEO: whole[FALSE_VIDEO][:1]}


def trained(*tasks, texts=("t",)) -> TrainedSplit:
    return TrainedSplit(module(*tasks).eval(), _Data(texts), "test")


@torch.inference_mode()
def test_question_suite_counts_unknown_answers_as_wrong():
    found = question_answering(trained("answer")).metrics
    assert found["answer/accuracy"] == pytest.approx(found["answer/filtered_accuracy"] * 3 / 4)


@torch.inference_mode()
def test_choice_and_pretraining_suites():
    subject = trained("reason", texts=("a", "b", "c"))
    result = multiple_choice(subject)
    assert result.baselines["chance"]["choice/both_accuracy"] == pytest.approx(100 / 9)
    outputs = subject.module.shared_step(batch(), "test").outputs
    both = (outputs["choice_predicted"] == outputs["choice_labels"])[:3]
    both &= (outputs["reason_predicted"] == outputs["reason_labels"])[:3]
    assert result.metrics["choice/both_accuracy"] == pytest.approx(both.float().mean().item() * 100)
    assert pretraining(trained("match", "mlm")).metrics.keys() == {"match/accuracy", "mlm/accuracy"}


@torch.inference_mode()
def test_retrieval_reranks_the_best_of_the_dual_encoder():
    subject = trained("contrastive", "rank")
    plain = pair_retrieval(subject, ks=[1, 2], views=2).metrics
    assert {"retrieval/t2v_recall@1", "retrieval/v2t_median_rank"} <= plain.keys()
    everything = pair_retrieval(subject, ks=[1, 2], rerank=4).metrics
    fused = pair_retrieval(TrainedSplit(_as(subject.module, "rank"), subject.data, "test"), ks=[1, 2]).metrics
    assert everything["reranked/t2v_recall@1"] == fused["fused/t2v_recall@1"]
    assert everything["reranked/t2v_mean_rank"] == fused["fused/t2v_mean_rank"]
    assert everything["reranked/v2t_recall@1"] == fused["fused/v2t_recall@1"]
    with pytest.raises(UserError, match="rerank needs"):
        pair_retrieval(TrainedSplit(_as(subject.module, "contrastive"), subject.data, "test"), rerank=1)


def _as(built: AllInOneModule, *tasks) -> AllInOneModule:
    other = module(*tasks).eval()
    other.load_pretrained(built.state_dict())
    return other


def test_dropout_and_patch_order_repeat_after_a_resume(tmp_path):
    import pytorch_lightning as pl

    from experiments.run.callbacks import RandomSteps

    quiet = {f"enable_{part}": False for part in ("checkpointing", "progress_bar", "model_summary")}

    def run(epochs: int, resume: str | None = None) -> tuple[AllInOneModule, pl.Trainer]:
        built = module("match", "mlm", optimizer=partial(torch.optim.SGD, lr=0.1))
        assert built.model.train_order == "random" and built.model.text_embeddings.dropout.p > 0
        trainer = pl.Trainer(max_epochs=epochs, default_root_dir=tmp_path, callbacks=[RandomSteps(3)], **quiet)
        trainer.fit(built, torch.utils.data.DataLoader([batch(), batch()], batch_size=None), ckpt_path=resume)
        return built, trainer

    whole, _ = run(2)
    _, first = run(1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(99)
    again, _ = run(2, str(tmp_path / "half.ckpt"))
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
