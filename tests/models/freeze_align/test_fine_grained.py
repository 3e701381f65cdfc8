import pytest
import torch

from models.freeze_align.fine_grained import fine_grained_loss, inner_words
from tests.golden.freeze_align import words_that_count


@pytest.fixture
def batch():
    torch.manual_seed(0)
    patches, words = torch.randn(3, 9, 6, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0]], dtype=torch.bool)
    return patches, words, mask


def test_the_order_of_patches_and_samples_changes_nothing(batch):
    loss = fine_grained_loss(*batch, temperature=torch.tensor(0.1))
    patches, words, mask = batch
    torch.testing.assert_close(fine_grained_loss(patches.flip(1), words, mask, torch.tensor(0.1)), loss)
    torch.testing.assert_close(fine_grained_loss(*(side.roll(1, 0) for side in batch), torch.tensor(0.1)), loss)


def test_words_that_do_not_count_change_nothing(batch):
    patches, words, mask = batch
    changed = torch.where(mask[..., None], words, torch.randn_like(words))
    wanted = fine_grained_loss(patches, words, mask, torch.tensor(0.1))
    torch.testing.assert_close(fine_grained_loss(patches, changed, mask, torch.tensor(0.1)), wanted)


def test_one_word_alone_is_always_told_apart(batch):
    patches, words, _ = batch
    alone = torch.zeros(3, 5, dtype=torch.bool)
    alone[:, 2] = True
    assert fine_grained_loss(patches, words, alone, torch.tensor(0.1)) == 0


def test_the_two_ways_to_leave_out_special_tokens_agree():
    ids = torch.tensor([[0, 7, 8, 2, 1], [0, 9, 2, 1, 1]])
    mask = ids != 1
    assert torch.equal(words_that_count(ids, mask, eos=2), inner_words(mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_single(batch, dtype):
    patches, words, mask = batch
    low = patches.to(dtype), words.to(dtype)
    wanted = fine_grained_loss(*(side.double() for side in low), mask, torch.tensor(0.1))
    with torch.autocast("cpu", dtype=dtype):
        loss = fine_grained_loss(*low, mask, torch.tensor(0.1))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-6)
