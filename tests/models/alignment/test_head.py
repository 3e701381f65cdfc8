from functools import partial

import pytest
import torch

from models.alignment.head import AlignmentHead
from models.alignment.projectors import GatedProjector, LinearProjector, MLPProjector


def test_embeddings_and_parameters():
    head = AlignmentHead(6, 4, 5, partial(GatedProjector, width_factor=2), text_projector=MLPProjector)
    assert head.encode_image(torch.randn(3, 6)).shape == (3, 5)
    assert head.encode_text(torch.randn(2, 4)).shape == (2, 5)
    assert isinstance(head.vision_projector, GatedProjector) and isinstance(head.text_projector, MLPProjector)
    assert head.logit_scale.shape == head.logit_bias.shape == (1,)
    torch.testing.assert_close(head.logit_scale.exp().item(), 20.0)
    assert head.logit_bias.item() == -10


def test_logits_are_scaled_cosines_with_texts_in_rows():
    head = AlignmentHead(6, 4, 5, LinearProjector)
    image, text = torch.randn(3, 5), torch.randn(2, 5)
    logits = head.logits_per_text(image, text)
    for i in range(2):
        for j in range(3):
            wanted = 20 * torch.cosine_similarity(text[i], image[j], dim=0) - 10
            torch.testing.assert_close(logits[i, j], wanted)


def test_a_positive_factor_of_the_features_does_not_matter():
    head = AlignmentHead(6, 4, 5, LinearProjector)
    x = torch.randn(3, 6)
    torch.testing.assert_close(head.encode_image(x), head.encode_image(x * 7), rtol=1e-4, atol=1e-5)


def test_half_precision_features_are_accepted():
    head = AlignmentHead(6, 4, 5, LinearProjector)
    x = torch.randn(3, 6).half()
    torch.testing.assert_close(head.encode_image(x), head.encode_image(x.float()))
    torch.testing.assert_close(head.encode_text(x[:, :4]), head.encode_text(x[:, :4].float()))


def test_vision_only_head():
    head = AlignmentHead(6, None, 5, LinearProjector)
    assert head.encode_image(torch.randn(3, 6)).shape == (3, 5)
    assert not [name for name in head.state_dict() if name.startswith("text")]
    with pytest.raises(ValueError, match="no text branch"):
        head.encode_text(torch.randn(3, 4))
