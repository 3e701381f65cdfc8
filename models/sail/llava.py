"""The aligned vision encoder as the visual stream of a causal language model: LLaVA-1.5's wiring (SAIL, section 5).

Visual tokens are ``mlp2x_gelu(head([CLS; patch]))``, one per patch. Library only: for a training script of LLaVA, which hands
its model to :func:`llava_with_aligned_vision`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from models.alignment.head import AlignmentHead
from models.encoders.pooling import pool_tokens


class AlignedVisionTower(nn.Module):
    """A DINOv2 and the image side of a head, with the outputs a vision tower of transformers has.

    Args:
        backbone: trained further or frozen, as the caller sets ``requires_grad``.
        head: takes CLS beside a patch, twice the backbone's width; ``text_dim=None`` leaves out a text side nobody needs.
    """

    def __init__(self, backbone: Dinov2Model, head: AlignmentHead):
        super().__init__()
        self.backbone, self.head = backbone, head

    @property
    def dtype(self) -> torch.dtype:
        return self.head.vision_norm.weight.dtype

    def forward(self, pixel_values: Tensor, **_options: object) -> BaseModelOutputWithPooling:
        """(B, 3, H, W) to ``last_hidden_state`` (B, P, D), which is also the only hidden state."""
        tokens = pool_tokens(self.backbone(pixel_values).last_hidden_state, "patch_mode")
        aligned = self.head.encode_image(tokens)
        return BaseModelOutputWithPooling(last_hidden_state=aligned, hidden_states=(aligned,))


def llava_with_aligned_vision(
    backbone: Dinov2Model, head: AlignmentHead, language_model: PreTrainedModel, image_token_id: int
) -> LlavaForConditionalGeneration:
    """LLaVA from an aligned vision encoder and a causal language model; its connector starts at random.

    A prompt holds ``image_token_id`` once per patch of each image. LLaVA-1.5 first trains ``model.multi_modal_projector``
    alone, then everything.
    """
    with torch.no_grad():
        embed_dim = head.encode_image(torch.zeros(1, head.vision_norm.normalized_shape[0])).shape[-1]
    config = LlavaConfig(
        vision_config=Dinov2Config(hidden_size=embed_dim, num_hidden_layers=0, num_attention_heads=1),
        text_config=language_model.config,
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu",
    )
    llava = LlavaForConditionalGeneration(config)
    llava.model.vision_tower = AlignedVisionTower(backbone, head)
    llava.model.language_model = language_model.get_decoder()
    llava.lm_head = language_model.get_output_embeddings()
    return llava
