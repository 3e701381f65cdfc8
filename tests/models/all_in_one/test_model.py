"""The fast paths compute what the plain order of operations computes, and the switches do what they say."""

import pytest
import torch

from experiments.benchmarks.reference import all_in_one as plain
from models.all_in_one import objectives
from models.all_in_one.cost import multiply_adds
from models.all_in_one.model import AllInOne
from models.all_in_one.rolling import roll_tokens
from models.all_in_one.text import content_mask, trim
from tests.golden.all_in_one import grids_from_pixels

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def small(**settings) -> AllInOne:
    torch.manual_seed(0)
    settings = {"width": 32, "depth": 3, "heads": 2, "patch_size": 8, "image_size": 32, "vocab_size": 50, **settings}
    model = AllInOne(**{"text_length": 12, "embed_dim": 16, "drop_rate": 0.0, "drop_path_rate": 0.0, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


@pytest.fixture
def batch():
    torch.manual_seed(1)
    mask = (torch.arange(12)[None] < torch.tensor([[5], [8]])).long()
    return {
        "ids": torch.randint(5, 50, (2, 12)) * mask,
        "mask": mask,
        "video": torch.randn(2, 3, 3, 32, 32),
        "false_video": torch.randn(2, 3, 3, 32, 32),
        "order": torch.rand(6, 16).argsort(dim=1),
    }


def test_roll_equals_plain_and_leaves_text():
    x = torch.randn(6, 4 + 17, 5)
    rolled = roll_tokens(x, frames=3, start=4)
    torch.testing.assert_close(rolled[:, 4:], plain.roll(x[:, 4:], 3), rtol=0, atol=0)
    assert torch.equal(rolled[:, :4], x[:, :4])


def test_roll_returns_after_as_many_layers_as_frames():
    x = torch.randn(10, 17, 3)
    rolled = x
    for _ in range(5):
        rolled = roll_tokens(rolled, frames=5)
    assert torch.equal(rolled, x)


def test_roll_of_too_few_tokens_or_one_frame_is_nothing():
    x = torch.randn(6, 7, 3)
    assert torch.equal(roll_tokens(x, frames=3), x)
    x = torch.randn(6, 17, 3)
    assert torch.equal(roll_tokens(x, frames=1), x)


def test_fused_pass_equals_plain(batch):
    model = small()
    text, visual, pooled = plain.encode_pair(model, batch["ids"], batch["mask"], batch["video"], batch["order"])
    ours = model.encode_pair(batch["ids"], batch["mask"], model.embed(batch["video"]), batch["order"])
    torch.testing.assert_close(ours.text, text, **CLOSE)
    torch.testing.assert_close(ours.visual, visual, **CLOSE)
    torch.testing.assert_close(ours.pooled, pooled, **CLOSE)


@pytest.mark.parametrize("read", ["first", "text"])
@pytest.mark.parametrize("mixing", ["roll", "none", "joint"])
def test_trimmed_text_and_last_block_change_nothing(batch, read, mixing):
    model = small(mixing=mixing)
    patches = model.embed(batch["video"])
    whole = model.encode_pair(batch["ids"], batch["mask"], patches, batch["order"])
    ids, mask = trim(batch["ids"], batch["mask"])
    part = model.encode_pair(ids, mask, patches, batch["order"], read=read)
    assert ids.shape[1] == 8
    torch.testing.assert_close(part.pooled, whole.pooled, **CLOSE)
    if read == "text":
        torch.testing.assert_close(part.text, whole.text[:, :8], **CLOSE)


def test_text_pass_equals_copies_per_frame(batch):
    model = small()
    ours = model.encode_text(*trim(batch["ids"], batch["mask"]), read="first").first
    torch.testing.assert_close(ours, plain.encode_text(model, batch["ids"], batch["mask"], 3), **CLOSE)


def test_pretraining_step_equals_plain(batch):
    model = small().train()
    labels = torch.full_like(batch["ids"], -100)
    labels[:, 1:3] = batch["ids"][:, 1:3]
    matched = torch.tensor([0, 1])
    other = torch.rand(6, 16).argsort(dim=1)
    reference = plain.pretraining_loss(
        model, {**batch, "masked_ids": batch["ids"], "labels": labels, "matched": matched}, batch["order"], other
    )
    gradients = torch.autograd.grad(reference, model.transformer.patch_embed.proj.weight)
    patches, false = model.embed(batch["video"]), model.embed(batch["false_video"][matched == 0])
    mlm, _ = objectives.masked_language(model, batch["ids"], batch["mask"], labels, patches, batch["order"])
    vtm = objectives.video_text_matching(model, batch["ids"], batch["mask"], matched, patches, false, other)
    ours = mlm + vtm.match + vtm.align
    torch.testing.assert_close(ours, reference, **CLOSE)
    found = torch.autograd.grad(ours, model.transformer.patch_embed.proj.weight)
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-5)


def test_candidates_share_a_clip(batch):
    model = small(tasks=["rank"])
    ids = torch.stack([batch["ids"], batch["ids"].flip(0)], dim=1)
    mask = torch.stack([batch["mask"], batch["mask"].flip(0)], dim=1)
    scores = objectives.candidate_scores(model, "rank_output", ids, mask, model.embed(batch["video"]))
    for column in range(2):
        alone = model.encode_pair(ids[:, column], mask[:, column], model.embed(batch["video"]))
        torch.testing.assert_close(scores[:, column], model.rank_output(alone.pooled)[:, 0], **CLOSE)


def reversed_pooled(model, batch):
    both = [
        model.encode_pair(batch["ids"], batch["mask"], model.embed(v)).pooled for v in (batch["video"], batch["video"].flip(1))
    ]
    return (both[0] - both[1]).abs().max().item()


def test_only_the_roll_knows_the_order_without_time_vectors(batch):
    assert reversed_pooled(small(mixing="roll", time_vectors=False, eval_order="shared"), batch) > 1e-4
    assert reversed_pooled(small(mixing="none", time_vectors=False, eval_order="shared"), batch) < 1e-5
    assert reversed_pooled(small(mixing="joint", time_vectors=False, eval_order="shared"), batch) < 1e-5
    assert reversed_pooled(small(mixing="joint"), batch) > 1e-4


def test_video_alone_does_not_roll(batch):
    model = small(time_vectors=False)
    first, second = (model.encode_video(model.embed(v)).first for v in (batch["video"], batch["video"].flip(1)))
    torch.testing.assert_close(first, second, **CLOSE)


def test_seeded_order_repeats_and_random_does_not(batch):
    encode = lambda model: model.encode_pair(batch["ids"], batch["mask"], model.embed(batch["video"])).pooled  # noqa: E731
    assert torch.equal(encode(small()), encode(small()))
    model = small(eval_order="random")
    assert not torch.allclose(encode(model), encode(model))


def test_padded_pictures_are_masked():
    model = small()
    ids, mask = torch.tensor([[2, 7, 3]]), torch.ones(1, 3, dtype=torch.long)
    picture = torch.rand(1, 1, 3, 32, 32) + 0.5
    padded = torch.zeros(2, 1, 3, 32, 40)
    padded[0, :, :, :, :32], padded[1] = picture[0], 1.0
    grids = grids_from_pixels(padded.flatten(0, 1), 8)
    assert grids.tolist() == [[4, 4], [4, 5]]
    both = model.encode_pair(ids.repeat(2, 1), mask.repeat(2, 1), model.embed(padded, grids, still=True))
    alone = model.encode_pair(ids, mask, model.embed(picture, still=True))
    torch.testing.assert_close(both.pooled[:1], alone.pooled, **CLOSE)


def test_padding_of_a_whole_picture_is_an_error():
    with pytest.raises(ValueError, match="all padding"):
        grids_from_pixels(torch.zeros(1, 3, 16, 16), 8)


def test_too_many_frames_and_words_are_errors(batch):
    model = small(frames=2)
    with pytest.raises(ValueError, match="3 frames"):
        model.embed(batch["video"])
    with pytest.raises(ValueError, match="20 tokens"):
        model.encode_text(torch.ones(1, 20, dtype=torch.long), torch.ones(1, 20, dtype=torch.long))


def test_content_mask_drops_first_and_last():
    assert content_mask(torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])).tolist() == [
        [False, True, True, False, False],
        [False] * 5,
    ]


def test_losses_without_targets_are_zero(batch):
    model = small()
    labels = torch.full_like(batch["ids"], -100)
    loss, _ = objectives.masked_language(model, batch["ids"], batch["mask"], labels, model.embed(batch["video"]))
    assert loss.item() == 0
    assert objectives.answer_loss(torch.randn(3, 4), torch.full((3,), -100)).item() == 0


SIZES = [((192, 3, False), (4.64, 3.76, 0.22)), ((384, 6, True), (16.9, 13.9, 0.86)), ((768, 12, False), (63.8, 52.7, 3.43))]


@pytest.mark.parametrize("size, giga", SIZES)
def test_cost_of_the_released_sizes(size, giga):
    width, heads, distilled = size
    with torch.device("meta"):
        model = AllInOne.__new__(AllInOne)
        try:
            AllInOne.__init__(model, width=width, heads=heads, distilled=distilled)
        except NotImplementedError:
            pytest.skip("this torch cannot initialise on the meta device")
    found = [multiply_adds(model, *passes) / 1e9 for passes in ((3, 40), (3, 0), (0, 40))]
    assert found == pytest.approx(giga, rel=0.005)
    assert multiply_adds(model, 3, 40, save=True) < 0.94 * multiply_adds(model, 3, 40)
