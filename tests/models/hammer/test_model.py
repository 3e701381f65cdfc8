import pytest
import torch

from datamodules.tokenizers.word_labels import raw_words
from tests.models.hammer.stand_in import small_batch, small_hammer


def forward(model, batch):
    return model(batch["image"], batch["token_ids"], batch["token_mask"])


def test_padding_says_nothing():
    model, batch = small_hammer().eval(), small_batch()
    batch["token_mask"][:, 4:] = 0
    changed = {**batch, "token_ids": batch["token_ids"].clone()}
    changed["token_ids"][:, 4:] = 7
    with torch.no_grad():
        before, after = forward(model, batch), forward(model, changed)
    for name in ("real_fake", "multi_label", "box"):
        torch.testing.assert_close(getattr(before, name), getattr(after, name), msg=name)
    torch.testing.assert_close(before.token[:, :3], after.token[:, :3])


@pytest.mark.parametrize("modality, absent", [("image", ("token", "text", "fused")), ("text", ("box", "image", "pooled"))])
def test_single_modality_looks_at_it_alone(modality, absent):
    model, batch = small_hammer(modality=modality).eval(), small_batch()
    other = ("token_ids", "token_mask") if modality == "image" else ("image",)
    with torch.no_grad():
        output = forward(model, {**batch, **dict.fromkeys(other)})
    assert all(getattr(output, name) is None for name in absent)
    assert output.real_fake.shape == (4, 2) and output.multi_label.shape == (4, 4)
    assert not any("_m." in name or "queue" in name for name in model.state_dict())


def test_momentum_towers_start_as_copies_and_follow():
    model = small_hammer()
    assert all(torch.equal(average, online) for average, online in model.momentum_pairs())
    with torch.no_grad():
        model.visual_encoder.pos_embed += 1
    before = model.visual_encoder_m.pos_embed.clone()
    model.update_momentum()
    torch.testing.assert_close(model.visual_encoder_m.pos_embed, before + (1 - model.momentum))
    assert not any(average.requires_grad for average, _ in model.momentum_pairs())


def test_momentum_classifier_officially_starts_elsewhere():
    model = small_hammer(copy_momentum_classifier=False)
    online, average = model.text_encoder.classifier[0], model.text_encoder_m.classifier[0]
    assert not torch.equal(online.weight, average.weight)
    assert torch.equal(
        model.text_encoder.bert.embeddings.LayerNorm.weight, model.text_encoder_m.bert.embeddings.LayerNorm.weight
    )


def test_queue_goes_round():
    model = small_hammer(queue_size=7)
    features = torch.arange(1.0, 13)[:, None].expand(12, 8)
    for start in range(0, 12, 4):
        model.enqueue(features[start : start + 4], -features[start : start + 4])
    assert model.image_queue[0].tolist() == [8, 9, 10, 11, 12, 6, 7]
    assert torch.equal(model.text_queue, -model.image_queue)
    assert model.queue_ptr.tolist() == [5]
    model.enqueue(features, features)  # more than fit: the last ones stay
    assert sorted(model.image_queue[0].tolist()) == [6, 7, 8, 9, 10, 11, 12]


def test_raw_words_of_a_cut_caption():
    raw, cleaned = "a - well-known  U.K. man", "a well known"
    spans = [(0, 1), (2, 6), (7, 12)]
    assert raw_words(raw, cleaned, spans) == [0, 2, 2]
