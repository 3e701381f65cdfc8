"""What the figures show: attention over the image, weights of managers, cost."""

import pytest
import torch

from models.two_tower.attention import image_attention, manager_weights
from models.two_tower.cost import multiply_adds
from tests.models.two_tower.stand_in import small_images, small_model, small_texts


@pytest.mark.parametrize("connector", ["none", "bridge", "adaptive_manager"])
def test_attention_over_the_image_is_a_share(connector):
    model, (ids, mask) = small_model(connector), small_texts()
    text, image = model.encode_text(ids, mask), model.encode_image(small_images())
    maps = image_attention(model, text, image)
    assert maps.shape == (4, 2, 2) and bool((maps > 0).all()) and bool((maps.flatten(1).sum(1) < 1).all())


def test_attention_is_that_of_the_fused_pass():
    """A value that only one patch holds enters the output with the weight that the map shows."""
    model, (ids, mask) = small_model("none", heads=1, levels=1), small_texts()
    text, image = model.encode_text(ids, mask), model.encode_image(small_images())
    layer = model.cross_modal_text_layers[-1].crossattention
    with torch.no_grad():
        layer.self.value.weight.copy_(torch.eye(16))
        layer.self.value.bias.zero_()
    seen = []
    layer.output.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.fuse(text, image, read="first")
    maps = image_attention(model, text, image).flatten(1)
    first = 1 - maps.sum(1, keepdim=True)
    weights = torch.cat([first, maps], dim=1)
    torch.testing.assert_close(seen[0][:, 0], torch.einsum("bl,bld->bd", weights, image.experts[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("connector", ["static_manager", "adaptive_manager", "adaptive_manager_own"])
def test_manager_weights_sum_to_one(connector):
    model, (ids, mask) = small_model(connector), small_texts()
    weights = manager_weights(model, model.encode_text(ids, mask), model.encode_image(small_images()))
    assert weights["text"].shape == (3, 3) and weights["image"].shape == (3, 2)
    for of_side in weights.values():
        torch.testing.assert_close(of_side.sum(dim=1), torch.ones(3))


def test_saved_multiply_adds():
    saved, all_of_it = (multiply_adds(small_model("adaptive_manager"), 8, save=save) for save in (True, False))
    assert saved < all_of_it and multiply_adds(small_model("bridge"), 8) < saved
    assert multiply_adds(small_model("none"), 8) < multiply_adds(small_model("bridge"), 8)
