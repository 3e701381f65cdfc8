"""The shortcuts of the two-tower models give what the plain forms give."""

import pytest
import torch

from models.errors import UserError
from models.two_tower import objectives
from models.two_tower.managers import AdaptiveManager, StaticManager, normalised
from models.two_tower.retrieval import NOT_SCORED, recalls, rerank
from tests.models.two_tower.stand_in import CONNECTORS, plain_adaptive, plain_static, small_images, small_model, small_texts


@pytest.mark.parametrize("connector", CONNECTORS)
def test_reading_less_and_trimming_change_nothing(connector):
    model, (ids, mask), images = small_model(connector), small_texts(), small_images()
    whole = model(ids, mask, images)
    text, image = model.encode_text(ids, mask), model.encode_image(images)
    assert text.mask.shape[1] < ids.shape[1]
    first, of_text = model.fuse(text, image, read="first"), model.fuse(text, image, read="text")
    assert first.text.shape[1] == first.image.shape[1] == 1 and of_text.image is None
    torch.testing.assert_close(first.pooled, whole.pooled)
    torch.testing.assert_close(first.image, whole.image[:, :1])
    real = text.mask.bool()
    torch.testing.assert_close(of_text.text[real], whole.text[:, : real.shape[1]][real])


@pytest.mark.parametrize("connector", CONNECTORS)
def test_rows_and_starts_change_nothing(connector):
    model, (ids, mask), images = small_model(connector), small_texts(), small_images()
    text, image = model.encode_text(ids, mask), model.encode_image(images)
    order = torch.tensor([2, 0, 0, 3])
    pairs = model.fuse(model.start("text", text).rows(order), model.start("image", image).rows(order.flip(0)))
    plain = model(ids[order], mask[order], images[order.flip(0)])
    torch.testing.assert_close(pairs.pooled, plain.pooled)
    half = model.fuse(model.start("text", text), image)
    torch.testing.assert_close(half.pooled, model(ids, mask, images).pooled)


@pytest.mark.parametrize("connector", ["adaptive_manager", "adaptive_manager_official"])
def test_padding(connector):
    """Masked padding is not noticed; unmasked padding is, and trimming then gives the result of the longer padding."""
    model, images = small_model(connector), small_images()
    pooled = []
    for padded in (7, 8, 12):
        ids, mask = small_texts(padded=padded)
        plain = model(ids, mask, images).pooled
        trimmed = model.fuse(model.encode_text(ids, mask), model.encode_image(images), read="first").pooled
        torch.testing.assert_close(trimmed, plain)
        pooled.append(plain)
    same = torch.allclose(pooled[0], pooled[2], atol=1e-6)
    assert same == (connector == "adaptive_manager")


def test_unmasked_padding_is_not_trimmed_in_training():
    ids, mask = small_texts()
    for connector, length in (("adaptive_manager_official", 10), ("adaptive_manager", 7), ("bridge", 7)):
        assert small_model(connector).train().encode_text(ids, mask).mask.shape[1] == length


@pytest.mark.parametrize("weight_type", ["vector", "scalar"])
@pytest.mark.parametrize("crosses, softmax", [(0, True), (1, True), (2, False)])
def test_static_managers_equal_the_formula(weight_type, crosses, softmax):
    torch.manual_seed(0)
    manager = StaticManager(8, 3, crosses, weight_type, temperature=0.7, softmax=softmax).eval()
    experts, own = (list(torch.randn(count, 2, 5, 8)) for count in (3, 2))
    for parameter in manager.parameters():
        torch.nn.init.normal_(parameter, mean=0.5)
    ours = manager([normalised(x, 1e-5) for x in experts], own)
    torch.testing.assert_close(ours, plain_static(manager, experts, own))


@pytest.mark.parametrize("weight_type", ["vector", "scalar"])
def test_adaptive_managers_equal_the_formula(weight_type):
    torch.manual_seed(0)
    manager = AdaptiveManager(8, 3, weight_type, temperature=0.7).eval()
    for parameter in manager.parameters():
        torch.nn.init.normal_(parameter, mean=0.5)
    experts, own, other = list(torch.randn(3, 2, 5, 8)), [torch.randn(2, 5, 8)], torch.randn(2, 4, 8)
    ours = manager([normalised(x, 1e-5) for x in experts], own, other)
    torch.testing.assert_close(ours, plain_adaptive(manager, experts, own, other))


@pytest.mark.parametrize("connector", ["static_manager", "adaptive_manager"])
def test_noise_is_drawn_in_training_only(connector):
    model, (ids, mask), images = small_model(connector), small_texts(), small_images()
    again = [model(ids, mask, images).pooled for _ in range(2)]
    torch.testing.assert_close(*again)
    model.train()
    assert not torch.allclose(model(ids, mask, images).pooled, model(ids, mask, images).pooled)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_parameter_gets_a_gradient(connector):
    """DDP waits for the gradient of each parameter that asks for one."""
    model, (ids, mask), images = small_model(connector).train(), small_texts(), small_images()
    text, image = model.encode_text(ids, mask), model.encode_image(images)
    own = torch.arange(4)
    labels = torch.where(mask == 1, ids, -100)
    contrast = objectives.contrastive(model, text, image)
    total = contrast.loss + objectives.masked_language(model, text, image, labels)[0]
    total = total + objectives.hard_matching(model, text, image, own.flip(0), own.flip(0))[0]
    total = total + objectives.answer_logits(model, text, image).sum() + objectives.entailment_logits(model, text, image).sum()
    pair = small_model(connector, image_types=2).train()
    logits = objectives.pair_logits(
        pair, pair.encode_text(ids, mask), pair.encode_image(images), pair.encode_image(images.flip(0), kind=2)
    )
    logits.sum().backward()
    assert pair.nlvr2_classifier[0].weight.grad.abs().sum() > 0 and bool(
        (pair.token_type_embeddings.weight.grad != 0).any(1).all()
    )
    (total + objectives.rank_scores(model, text, image).sum()).backward()
    without = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith("nlvr2")}


def test_false_images_take_their_places():
    model, images = small_model(), small_images()
    image, other = model.encode_image(images), model.encode_image(small_images(2, seed=5))
    mixed = objectives.with_false_images(image, other, torch.tensor([1, 0, 1, 0]))
    torch.testing.assert_close(
        mixed.experts[0], torch.stack([image.experts[0][0], other.experts[0][0], image.experts[0][2], other.experts[0][1]])
    )


def test_masked_language_without_a_label_is_zero():
    model, (ids, mask) = small_model(), small_texts()
    loss, logits = objectives.masked_language(
        model, model.encode_text(ids, mask), model.encode_image(small_images()), torch.full_like(ids, -100)
    )
    assert loss == 0 and len(logits) == 0
    loss.backward()


def test_hard_negatives_are_never_of_the_same_image():
    model, (ids, mask), images = small_model(), small_texts(), small_images()
    medium = torch.tensor([3, 7, 3, 9])
    contrast = objectives.contrastive(model, model.encode_text(ids, mask), model.encode_image(images), medium)
    torch.testing.assert_close(contrast.positive[0], torch.tensor([True, False, True, False]))
    for weights in objectives.negative_weights(contrast):
        drawn = torch.stack([objectives.draw_negatives(weights) for _ in range(50)])
        assert bool((medium[drawn] != medium).all())
    assert bool((objectives.draw_negatives(torch.zeros(3, 4)) >= 0).all())


@pytest.mark.parametrize("connector", ["none", "bridge", "static_manager_all", "adaptive_manager", "adaptive_manager_official"])
def test_reranking_scores_candidates_once_and_as_pairs(connector):
    model, (ids, mask), images = small_model(connector), small_texts((3, 4, 5, 6, 7, 2)), small_images(3)
    texts, encoded = model.encode_text(ids, mask), model.encode_image(images)
    result = rerank(model, texts, encoded, count=2, batch_size=2)
    assert bool(((result.of_texts != NOT_SCORED).sum(dim=0) == 2).all())
    assert bool(((result.of_images != NOT_SCORED).sum(dim=1) == 2).all())
    for i, j in (result.scores != NOT_SCORED).nonzero().tolist():
        pooled = model(ids[j : j + 1], mask[j : j + 1], images[i : i + 1]).pooled
        torch.testing.assert_close(result.scores[i, j], model.rank_output(pooled)[0, 0])
    perfect = torch.eye(3).repeat_interleave(2, dim=1)
    assert set(recalls(perfect, torch.arange(3).repeat_interleave(2)).values()) == {100.0}


def test_bridges_need_as_many_layers_as_levels():
    with pytest.raises(UserError, match="fewer cross-modal layers"):
        small_model("bridge", levels=5)
    with pytest.raises(UserError, match="cannot mix 3 layers"):
        small_model("adaptive_manager", text_layers=2)
    small_model("adaptive_manager", levels=5)
