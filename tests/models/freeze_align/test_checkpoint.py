"""The token head: every kind of slot goes to official names and back, identities, and what does not fit."""

from functools import partial

import pytest
import torch

from models.alignment.projectors import GatedProjector, LinearProjector, ResidualMLPProjector, TokenProjector
from models.freeze_align.checkpoint import head_from_official, to_official
from models.freeze_align.head import TokenAlignmentHead
from models.io import CheckpointError

LINEAR = partial(LinearProjector, init="torch")


@pytest.mark.parametrize("local, cls", [(TokenProjector, TokenProjector), (None, ResidualMLPProjector), (LINEAR, None)])
@pytest.mark.parametrize("local_text, text", [(TokenProjector, ResidualMLPProjector), (None, LINEAR), (LINEAR, None)])
def test_round_trip(local, cls, local_text, text):
    head = TokenAlignmentHead(7, 6, 5, local, cls, local_text, text).eval()
    official = {f"module.{name}": value for name, value in to_official(head).items()}
    again = head_from_official({**official, "text_encoder.embeddings.weight": torch.zeros(2, 2)}).eval()
    tokens, words, mask = torch.randn(2, 4, 7), torch.randn(2, 3, 6), torch.tensor([[1, 1, 0], [1, 1, 1]])
    torch.testing.assert_close(again.encode_image(tokens), head.encode_image(tokens))
    torch.testing.assert_close(again.encode_text(words, mask), head.encode_text(words, mask))


def test_padding_does_not_count():
    head = TokenAlignmentHead(7, 6, 5, LINEAR, None, TokenProjector, LINEAR).eval()
    words = torch.randn(1, 3, 6)
    padded = torch.cat([words, 9 * torch.ones(1, 2, 6)], dim=1)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    torch.testing.assert_close(head.encode_text(padded, mask), head.encode_text(words, torch.ones(1, 3)))


def test_without_a_mask_all_tokens_count():
    head = TokenAlignmentHead(7, 6, 5, LINEAR, None, TokenProjector, LINEAR).eval()
    words = torch.randn(2, 3, 6)
    torch.testing.assert_close(head.encode_text(words), head.encode_text(words, torch.ones(2, 3)))


def test_what_does_not_fit_is_named():
    with pytest.raises(CheckpointError, match="'temp' is missing"):
        head_from_official({"logit_scale": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="unknown projector"):
        head_from_official({"temp": torch.tensor(0.07), "text_proj.odd": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="no counterpart"):
        to_official(TokenAlignmentHead(4, 4, 4, GatedProjector, None, None, LINEAR))
    with pytest.raises(ValueError, match="width"):
        TokenAlignmentHead(7, 6, 5, LINEAR)
