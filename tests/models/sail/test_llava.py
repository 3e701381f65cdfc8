"""LLaVA's wiring at tiny size: patches become tokens of the language model, and training reaches what it should."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from models.alignment.head import AlignmentHead
from models.alignment.projectors import GatedProjector, LinearProjector
from models.encoders.pooling import pool_tokens
from models.sail.llava import llava_with_aligned_vision

IMAGE, PATCHES = 3, 4  # id of the image token; 8 x 8 pixels in patches of 4


@pytest.fixture(params=[LinearProjector, partial(GatedProjector, width_factor=2)])
def model(request):
    torch.manual_seed(0)
    backbone = Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4))
    head = AlignmentHead(16, None, 6, request.param)
    config = LlamaConfig(
        vocab_size=20, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        initializer_range=0.3,
    )  # fmt: skip
    return llava_with_aligned_vision(backbone, head, LlamaForCausalLM(config), IMAGE)


def _batch():
    g = torch.Generator().manual_seed(0)
    text = torch.randint(4, 20, (2, 5), generator=g)
    ids = torch.cat([torch.full((2, PATCHES), IMAGE), text], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 8, 8, generator=g)}


def test_visual_tokens_are_the_connected_aligned_patches(model):
    batch, inner = _batch(), model.model
    tower = inner.vision_tower
    patches = pool_tokens(tower.backbone(batch["pixel_values"]).last_hidden_state, "patch_mode")
    visual = inner.multi_modal_projector(tower.head.encode_image(patches))
    assert visual.shape == (2, PATCHES, 12)
    words = inner.language_model.embed_tokens(batch["input_ids"][:, PATCHES:])
    wanted = model.lm_head(inner.language_model(inputs_embeds=torch.cat([visual, words], dim=1)).last_hidden_state)
    torch.testing.assert_close(model(**batch).logits, wanted)


def test_the_connector_learns_alone_then_everything(model):
    batch = _batch()
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, -100)
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.model.multi_modal_projector.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    model.requires_grad_(True)
    model(**batch, labels=labels).loss.backward()
    tower = model.model.vision_tower
    for part in (tower.head.vision_norm.weight, tower.backbone.layernorm.weight, *tower.head.vision_projector.parameters()):
        assert part.grad.abs().sum() > 0


def test_generation_sees_the_image(model):
    batch = _batch()
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=3, do_sample=False)
        other = model(**{**batch, "pixel_values": -batch["pixel_values"]}).logits
    assert out.shape == (2, batch["input_ids"].shape[1] + 3)
    assert not torch.allclose(other, model(**batch).logits)


def test_the_number_of_image_tokens_must_fit(model):
    batch = _batch()
    batch["input_ids"][0, 0] = 5
    with pytest.raises((ValueError, RuntimeError), match="do not match"):
        model(**batch)
