"""HAMMER: two encoders, an aggregator, a grounding branch and four heads (arXiv 2304.02556; official ``models/HAMMER.py``).

Module names are those of the official checkpoints. Shapes: B batch, L caption tokens with [CLS] and without [SEP], N image
patches, D width, E width of the contrastive features, Q length of the queues.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.hammer.batch import MANIPULATIONS as MANIPULATIONS
from models.hammer.bert import FusionBert
from models.layers.feature_queue import enqueue_
from models.layers.heads import init_linear_, mlp_head
from models.optim.ema import ema_update_

TOWERS = ("visual_encoder", "vision_proj", "text_encoder", "text_proj")  # those with a momentum copy, suffix ``_m``
TEMPERATURE_RANGE = (0.001, 0.5)
Modality = Literal["both", "image", "text"]


class HammerOutput(NamedTuple):
    """What the four heads say, and the tensors they were computed from. A single-modality variant leaves None."""

    real_fake: Tensor  # (B, 2) logits, class 1 is manipulated
    multi_label: Tensor  # (B, 4) logits, columns as in MANIPULATIONS
    box: Tensor | None  # (B, 4) centre x, centre y, width, height as shares of the image
    token: Tensor | None  # (B, L-1, 2) logits of the tokens behind [CLS], class 1 is manipulated
    image: Tensor | None  # (B, N+1, D)
    text: Tensor | None  # (B, L, D) before the fusion
    fused: Tensor | None  # (B, L, D)
    grounded: Tensor | None  # (B, N+1, D) what the image attends to in the text
    pooled: Tensor | None  # (B, 1, D) local patches, aggregated


class MomentumOutput(NamedTuple):
    """Of the momentum towers, without gradient: unit features (B, E) and token logits (B, L-1, 2) if they were asked for."""

    image: Tensor
    text: Tensor
    token: Tensor | None


class Hammer(nn.Module):
    """The complete model; the defaults are the official sizes.

    The heads of multi-label and token detection and the detection of a manipulation share one pass through the aggregator;
    the official code runs the text layers a second time for the tokens, with the same result when dropout is off.

    Args:
        image_size: side of an image, pixels.
        patch_size: side of a patch, pixels.
        width: D, of both encoders.
        vision_layers: blocks of the image encoder.
        vision_heads: heads of the image encoder.
        text_layers: BERT layers in all.
        fusion_layer: index of the first BERT layer that attends to the image.
        text_heads: heads of BERT.
        text_intermediate: hidden width of BERT's MLPs.
        vocab_size: rows of BERT's word table.
        max_positions: rows of BERT's position table.
        grounding_heads: of the two attention modules of the grounding branch.
        embed_dim: E.
        queue_size: Q.
        temperature: initial value of the learnt temperature.
        momentum: of the momentum towers.
        mlp_ratio: hidden width of the image encoder's MLPs over D.
        dropout: of BERT and before the token head.
        modality: 'image' keeps the image encoder and boxes alone, 'text' the text encoder and tokens alone (the official
            single-modality rows; their code is not released).
        copy_momentum_classifier: start the momentum token head as a copy of the online one. False starts it at random, as
            the official code does, which then distils noise into the tokens until the average has caught up.
    """

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 16,
        width: int = 768,
        vision_layers: int = 12,
        vision_heads: int = 12,
        text_layers: int = 12,
        fusion_layer: int = 6,
        text_heads: int = 12,
        text_intermediate: int = 3072,
        vocab_size: int = 30522,
        max_positions: int = 512,
        grounding_heads: int = 12,
        embed_dim: int = 256,
        queue_size: int = 65536,
        temperature: float = 0.07,
        momentum: float = 0.995,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        modality: Modality = "both",
        copy_momentum_classifier: bool = True,
    ):
        super().__init__()
        self.momentum, self.modality = momentum, modality
        if modality != "text":
            self.visual_encoder = VisionTransformer(
                image_size,
                patch_size,
                embed_dim=width,
                depth=vision_layers,
                num_heads=vision_heads,
                mlp_ratio=mlp_ratio,
                num_classes=0,
                global_pool="",
            )
            nn.init.trunc_normal_(self.visual_encoder.cls_token, std=0.02)  # ALBEF; timm begins at almost 0
            self.bbox_head = _head(width, 4)
            self.cls_token_local = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
            self.norm_layer_aggr = nn.LayerNorm(width)
            self.aggregator = nn.MultiheadAttention(width, grounding_heads, batch_first=True)
        if modality != "image":
            self.text_encoder = nn.Module()
            self.text_encoder.bert = FusionBert(
                vocab_size,
                width,
                text_layers,
                fusion_layer,
                text_heads,
                text_intermediate,
                max_positions,
                dropout,
                cross_attention=modality == "both",
            )
            self.text_encoder.classifier = _head(width, 2)
            self.token_dropout = nn.Dropout(dropout)
        if modality == "both":
            self.vision_proj, self.text_proj = nn.Linear(width, embed_dim), nn.Linear(width, embed_dim)
            self.norm_layer_it_cross_atten = nn.LayerNorm(width)
            self.it_cross_attn = nn.MultiheadAttention(width, grounding_heads, batch_first=True)
            self.temp = nn.Parameter(torch.tensor(float(temperature)))
        self.itm_head, self.cls_head = _head(width, 2), _head(width, 4)
        self.apply(init_linear_)
        if modality == "both":
            self._add_momentum_towers(copy_momentum_classifier)
            for name in ("image_queue", "text_queue"):
                queue = F.normalize(torch.randn(embed_dim, queue_size), dim=0)
                self.register_buffer(name, queue.T.contiguous().T)  # columns lie together: they are written and read so
            self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    # ---- online ---------------------------------------------------------------------------------------------------

    def forward(self, image: Tensor | None, input_ids: Tensor | None, mask: Tensor | None) -> HammerOutput:
        """Images (B, 3, R, R), token ids and mask (B, L). What the variant does not look at may be None."""
        image_embeds = text_embeds = fused = token = box = grounded = pooled = None
        if self.modality != "text":
            image_embeds = self.visual_encoder(image)
        if self.modality != "image":
            text_embeds = self.text_encoder.bert.read(input_ids, mask)
            fused = self.text_encoder.bert.fuse(text_embeds, mask, image_embeds)
            token = self.text_encoder.classifier(self.token_dropout(fused[:, 1:]))
        if self.modality != "text":
            box, grounded, pooled = self._ground(image_embeds, text_embeds, mask)
        verdict = fused[:, 0] if fused is not None else image_embeds[:, 0]
        return HammerOutput(
            self.itm_head(verdict), self.cls_head(verdict), box, token, image_embeds, text_embeds, fused, grounded, pooled
        )

    def _ground(self, image: Tensor, text: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Local patch attentional aggregation, on the embeddings before the fusion: (B, 4), (B, N+1, D), (B, 1, D)."""
        grounded = None
        if text is not None:
            query, key = self.norm_layer_it_cross_atten(image), self.norm_layer_it_cross_atten(text)
            grounded = self.it_cross_attn(query, key, key, key_padding_mask=mask == 0, need_weights=False)[0]
            image = image + grounded
        query = self.norm_layer_aggr(self.cls_token_local.expand(len(image), -1, -1))
        patches = self.norm_layer_aggr(image[:, 1:])
        pooled = self.aggregator(query, patches, patches, need_weights=False)[0]
        return self.bbox_head(pooled.squeeze(1)).sigmoid(), grounded, pooled

    def features(self, output: HammerOutput) -> tuple[Tensor, Tensor]:
        """Unit image and text features (B, E) of the class tokens, for the contrastive loss; float32."""
        return _unit(self.vision_proj(output.image[:, 0])), _unit(self.text_proj(output.text[:, 0]))

    # ---- momentum towers and queues ---------------------------------------------------------------------------------

    def _add_momentum_towers(self, copy_classifier: bool) -> None:
        for name in TOWERS:
            setattr(self, f"{name}_m", copy.deepcopy(getattr(self, name)).requires_grad_(False))
        if not copy_classifier:
            self.text_encoder_m.classifier.apply(init_linear_)

    def momentum_pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(average, online parameter) of every tower."""
        for name in TOWERS:
            yield from zip(getattr(self, f"{name}_m").parameters(), getattr(self, name).parameters(), strict=True)

    def update_momentum(self) -> None:
        """One step of the moving averages; once per optimiser step, before the first forward pass that uses them."""
        averages, online = zip(*self.momentum_pairs(), strict=True)
        ema_update_(averages, online, self.momentum)

    @torch.no_grad()
    def momentum_forward(self, image: Tensor, input_ids: Tensor, mask: Tensor, tokens: bool) -> MomentumOutput:
        """The momentum towers on a batch; ``tokens`` also asks for the logits that the token head learns from."""
        image = self.visual_encoder_m(image)
        text = self.text_encoder_m.bert.read(input_ids, mask)
        features = _unit(self.vision_proj_m(image[:, 0])), _unit(self.text_proj_m(text[:, 0]))
        if not tokens:
            return MomentumOutput(*features, None)
        fused = self.text_encoder_m.bert.fuse(text, mask, image)
        return MomentumOutput(*features, self.text_encoder_m.classifier(self.token_dropout(fused[:, 1:])))

    @torch.no_grad()
    def enqueue(self, image: Tensor, text: Tensor) -> None:
        """Momentum features (B, E) of all processes replace the oldest ones. After the backward pass of their step."""
        pointer = int(self.queue_ptr)
        self.queue_ptr.fill_(enqueue_(self.image_queue, image, pointer))
        enqueue_(self.text_queue, text, pointer)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        self.temp.clamp_(*TEMPERATURE_RANGE)


def _head(width: int, out: int) -> nn.Sequential:
    """Two hidden layers of twice the width: used four times."""
    return mlp_head(width, 2 * width, 2 * width, out=out)


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=-1)
