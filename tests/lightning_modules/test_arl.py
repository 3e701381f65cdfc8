"""The steps of ARL's module beyond what every module does."""

import pytest
import torch

from models.arl.batch import entity_keys
from models.arl.checkpoint import official_names
from models.arl.graph import NO_ENTITY, Graph, entity_auroc
from models.errors import UserError
from tests.lightning_modules.small import _arl, _images_with_entities

PRETRAINING = ("mlm", "mim", "match", "align")


def built(*tasks: str, **options):
    torch.manual_seed(0)
    return _arl(tasks, **options)


def batch_of(count: int = 6) -> dict:
    batch = _images_with_entities(count)
    return batch | {"matched": torch.tensor([1, 1, 1, 0, 0, 0]), "false_rows": torch.tensor([0, 5, 4])}


def test_graph_texts_and_images_are_encoded_once_for_all_objectives():
    counts = {}
    for share in (True, False):
        module = built(*PRETRAINING, share_encodings=share).eval()
        calls = []
        module.model.align_head.register_forward_hook(lambda *_, calls=calls: calls.append("graph"))
        module.model.text_transformer.register_forward_hook(lambda *_, calls=calls: calls.append("text"))
        module.model.vit_model.visual.register_forward_hook(lambda *_, calls=calls: calls.append("image"))
        losses = module.shared_step(batch_of(), "val").losses
        counts[share] = losses, {name: calls.count(name) for name in set(calls)}
    assert counts[True][1] == {"graph": 1, "text": 2, "image": 2}  # masked and whole text; whole and masked image
    assert all(counts[False][1][name] > counts[True][1][name] for name in counts[True][1])
    for name, value in counts[True][0].items():
        torch.testing.assert_close(value, counts[False][0][name])


def test_entities_reach_the_answer_only_where_the_model_reasons_with_them():
    batch = batch_of()
    without = {**batch, entity_keys("question")[0]: torch.full_like(batch[entity_keys("question")[0]], NO_ENTITY)}
    for reason in (True, False):
        module = built("answer", reason=reason).eval()
        answers = [module.shared_step(b, "val").losses["answer"] for b in (batch, without)]
        assert torch.equal(*answers) != reason


def test_masked_images_are_the_same_at_every_validation():
    module = built("mim", "align").eval()
    first, second = (module.shared_step(batch_of(), "val").losses["mim"] for _ in range(2))
    assert torch.equal(first, second)
    module.train()
    first, second = (module.shared_step(batch_of(), "train").losses["mim"] for _ in range(2))
    assert not torch.equal(first, second)


def test_fine_tuning_starts_from_pre_training():
    source, target = built(*PRETRAINING), built("rank")
    assert target.load_pretrained(official_names(source.model))
    torch.testing.assert_close(target.model.rank_output.weight, source.model.itm_score.fc.weight[1:])
    assert target.fresh_heads == []
    answering = built("answer")
    answering.load_official(official_names(source.model))
    assert answering.fresh_heads == ["vqa_classifier"]
    with pytest.raises(UserError, match="no trained head for 'answer'"):
        answering.eval().predict_step(batch_of())


def test_vectors_of_another_width_are_refused():
    graph = Graph(["a", "b"], torch.tensor([[0, 1]]), torch.zeros(2, 3))
    with pytest.raises(UserError, match="knowledge_width=8, but the entity vectors of the data have 3"):
        built("align", graph=graph)


def test_entity_auroc_counts_ordered_pairs():
    logits, labels = torch.tensor([[3.0, 1.0, 2.0, 0.0], [1.0, 2.0, 3.0, 4.0]]), torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]])
    out = entity_auroc(logits, labels.float())
    assert out[0].item() == pytest.approx(2 / 4) and out[1].item() == -1
