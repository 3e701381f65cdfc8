"""Two towers and a cross-modal encoder behind a swappable connector: METER, BridgeTower, ManagerTower.

Parameter names are those of the official checkpoints, those of the connector below ``connector.``. Shapes: B batch, L text
tokens, T image tokens, D width of the cross-modal encoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.bert import BertLayer, MLMHead
from models.layers.heads import mlp_head
from models.two_tower.connectors import SIDES, Connector, Side
from models.two_tower.towers import ClipVision, RobertaText

Task = Literal["mlm", "match", "contrastive", "contrastive_cross", "rank", "answer", "entail", "reason"]
Read = Literal["all", "text", "image", "first"]
TEMPERATURE_RANGE = (0.001, 0.5)
CLASSES = {"entail": 3, "reason": 2}


class Encoded(NamedTuple):
    """What one tower says about B texts or images, before they meet the other modality.

    ``experts``: what the connector prepared, (B, L, D) each. ``mask`` (B, L), None where all tokens count. ``feature``
    (B, W): token 0 of the last unimodal layer. ``bias`` (B, L): what an adaptive manager adds to its scores of these tokens,
    None for 0. ``entered``, ``attended`` (B, L, D): input and self-attention of the first cross-modal layer, where they are
    cached for many pairs. ``entities`` (B, M, K), ``entity_mask`` (B, M) bool and ``cover`` (B, M, L): vectors of what the text
    names, which of them count, and which tokens each of them covers (ARL alone).
    """

    experts: list[Tensor]
    mask: Tensor | None
    feature: Tensor
    bias: Tensor | None = None
    entered: Tensor | None = None
    attended: Tensor | None = None
    entities: Tensor | None = None
    entity_mask: Tensor | None = None
    cover: Tensor | None = None

    def rows(self, index: Tensor | slice) -> Encoded:
        """Of the samples ``index``: (n,), repeats allowed, or a slice."""
        return self.map(lambda part: part[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> Encoded:
        """With ``function`` of every tensor."""
        rest = (None if part is None else function(part) for part in self[1:])
        return Encoded([function(expert) for expert in self.experts], *rest)


class Fused(NamedTuple):
    """``text`` (B, L, D) and ``image`` (B, T, D), or their first token where only that is read, or None where one is not read;
    ``pooled`` (B, 2D) or None."""

    text: Tensor | None
    image: Tensor | None
    pooled: Tensor | None


class TwoTower(nn.Module):
    """The model with the heads of its tasks; the defaults are the base size.

    Args:
        connector: factory ``(width, levels, text_layers, image_layers) -> Connector``.
        tasks: which heads there are: ``mlm``; ``match`` (ITM); ``contrastive`` (ITC); ``contrastive_cross`` (ITC with a third
            embedding, of the pair: transformers' port); ``rank`` (a score per pair); ``answer`` (VQA), ``entail`` (SNLI-VE),
            ``reason`` (NLVR2: an image pair).
        image_size: side of an image, pixels.
        patch_size: side of a patch, pixels.
        image_width: of the image tower.
        image_layers: of the image tower.
        image_heads: of the image tower.
        text_width: of the text tower.
        text_layers: of the text tower.
        text_heads: of the text tower.
        text_intermediate: hidden width of the text tower's MLPs.
        vocab_size: rows of the word table.
        max_positions: rows of the text tower's position table.
        padding_id: word id of padding.
        width: D.
        levels: number of cross-modal layers.
        heads: of the cross-modal layers.
        mlp_ratio: hidden width of the cross-modal MLPs over D.
        answers: classes of the head ``answer``.
        embed_dim: of the contrastive space.
        temperature: initial value of the learnt temperature.
        head_scale: hidden width of the task heads over their input's.
        head_layers: 2, or 1 for a single linear layer.
        dropout: of the text tower and the cross-modal layers.
        pair_dropout: before the classifier of ``reason``.
        image_types: rows of the type table beside the text's: 2 for image pairs.
        shared_projections: one projection per tower for all layers; False: one for each (transformers' port).
        contrastive_source: the image's contrastive feature is of the tower, or ``projected`` (transformers' port).
        image_eps: of the image tower's LayerNorms.
        text_eps: of the text tower's.
        cross_eps: of the cross-modal layers': 1e-12 in the official code, 1e-5 in transformers' port.
        mlm_eps: of the head of ``mlm``, likewise.
        init_std: of the initial linear weights outside the image tower; the official 0.02 suits wide models, narrow ones hardly
            learn from it.
        text_layer: factory ``(width, heads, intermediate, dropout, cross, eps) -> BertLayer`` of the text's cross-modal layers.
    """

    def __init__(
        self,
        connector: Callable[..., Connector],
        tasks: Sequence[Task] = ("mlm", "match"),
        image_size: int = 288,
        patch_size: int = 16,
        image_width: int = 768,
        image_layers: int = 12,
        image_heads: int = 12,
        text_width: int = 768,
        text_layers: int = 12,
        text_heads: int = 12,
        text_intermediate: int = 3072,
        vocab_size: int = 50265,
        max_positions: int = 514,
        padding_id: int = 1,
        width: int = 768,
        levels: int = 6,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        answers: int | None = None,
        embed_dim: int = 256,
        temperature: float = 0.07,
        head_scale: float = 1.0,
        head_layers: Literal[1, 2] = 2,
        dropout: float = 0.1,
        pair_dropout: float = 0.0,
        image_types: int = 1,
        shared_projections: bool = True,
        contrastive_source: Literal["tower", "projected"] = "tower",
        image_eps: float = 1e-5,
        text_eps: float = 1e-5,
        cross_eps: float = 1e-12,
        mlm_eps: float = 1e-12,
        init_std: float = 0.02,
        text_layer: Callable[..., BertLayer] = BertLayer,
    ):
        super().__init__()
        self.width, self.levels, self.tasks = width, levels, tuple(tasks)
        self.contrastive_source = contrastive_source
        self.text_transformer = RobertaText(
            vocab_size, max_positions, text_width, text_layers, text_heads, text_intermediate, dropout, text_eps, padding_id
        )
        self.connector = connector(width=width, levels=levels, text_layers=text_layers, image_layers=image_layers)
        for side, of_tower in zip(SIDES, (text_width, image_width), strict=True):
            read = self.connector.read[side]
            projections = [nn.Linear(of_tower, width) for _ in (range(1) if shared_projections else read)]
            self.add_module(
                f"cross_modal_{side}_transform", projections[0] if shared_projections else nn.ModuleList(projections)
            )
            make = text_layer if side == "text" else BertLayer
            layers = (make(width, heads, int(width * mlp_ratio), dropout, True, cross_eps) for _ in range(levels))
            self.add_module(f"cross_modal_{side}_layers", nn.ModuleList(layers))
            pooler = nn.Module()
            pooler.dense = nn.Linear(width, width)
            self.add_module(f"cross_modal_{side}_pooler", pooler)
        self.token_type_embeddings = nn.Embedding(1 + image_types, width)
        nn.init.normal_(self.token_type_embeddings.weight, std=0.02)
        self._build_heads(vocab_size, text_width, image_width, embed_dim, temperature, mlm_eps)
        self._build_classifiers(answers, head_scale, head_layers, pair_dropout)
        self.apply(partial(init_linear, std=init_std))
        self.vit_model = nn.Module()  # has initial weights of its own
        self.vit_model.visual = ClipVision(image_size, patch_size, image_width, image_layers, image_heads, image_eps)

    def _build_heads(
        self, vocab_size: int, text_width: int, image_width: int, embed_dim: int, temperature: float, mlm_eps: float
    ) -> None:
        tasks, width = self.tasks, self.width
        if "mlm" in tasks:
            self.mlm_score = MLMHead(width, vocab_size, mlm_eps)
        if "match" in tasks:
            self.itm_score = _head(2 * width, 2)
        if "contrastive" in tasks or "contrastive_cross" in tasks:
            self.itc_text_head = _head(text_width, embed_dim)
            self.itc_image_head = _head(image_width if self.contrastive_source == "tower" else width, embed_dim)
            self.temperature = nn.Parameter(torch.tensor(float(temperature)))
        if "contrastive_cross" in tasks:
            self.itc_cross_modal_head = _head(2 * width, embed_dim)
        if "rank" in tasks:
            self.rank_output = nn.Linear(2 * width, 1)

    def _build_classifiers(self, answers: int | None, scale: float, layers: int, pair_dropout: float) -> None:
        hidden = [int(2 * self.width * scale)] if layers == 2 else []
        if "answer" in self.tasks:
            self.vqa_classifier = mlp_head(2 * self.width, *hidden, out=answers or 0)
        if "entail" in self.tasks:
            self.snli_classifier = mlp_head(2 * self.width, *hidden, out=CLASSES["entail"])
        if "reason" in self.tasks:
            self.pair_dropout = nn.Dropout(pair_dropout)
            self.nlvr2_classifier = mlp_head(4 * self.width, *hidden, out=CLASSES["reason"])

    # ---- towers -----------------------------------------------------------------------------------------------------

    def encode_text(self, ids: Tensor, mask: Tensor, trim: bool = True) -> Encoded:
        """Token ids and mask (B, L).

        Args:
            ids: (B, L).
            mask: (B, L), 1 at tokens; texts are padded on the right.
            trim: cut padding that no later result depends on, see :func:`trimmed`.
        """
        full = ids.shape[1]
        if trim:
            ids, mask = trimmed(ids, mask, spare=1 if self.connector.unmasked_padding else 0, exact=not self.training)
        return self.read_text(ids, mask, full)

    def read_text(self, ids: Tensor, mask: Tensor, full: int) -> Encoded:
        """Token ids and mask (B, L) of texts that had ``full`` tokens before they were trimmed."""
        read = self.connector.read["text"]
        last = len(self.text_transformer.encoder.layer) - 1
        states = self.text_transformer(ids, mask, range(read.start, last + 1))
        projected = self._project("text", states[: len(read)], 0)
        bias = self._padding_bias(mask, full)
        return Encoded(self.connector.prepare("text", projected), mask, states[-1][:, 0], bias)

    def shortened(self, text: Encoded, length: int) -> Encoded:
        """Encoded texts of at most ``length`` tokens without the padding that no later result depends on, in evaluation."""
        full = text.experts[0].shape[1]
        length = min(length + self.connector.unmasked_padding, full)
        if length == full or text.mask is None:
            return text
        mask, bias = text.mask[:, :length], text.bias
        if bias is not None:
            bias = bias[:, :length]
        if self.connector.unmasked_padding:
            more = _stand_in(mask, full - length)
            bias = more if bias is None else bias + more
        experts = [expert[:, :length] for expert in text.experts]
        entered, attended = (None if part is None else part[:, :length] for part in (text.entered, text.attended))
        cover = None if text.cover is None else text.cover[:, :, :length]
        return text._replace(experts=experts, mask=mask, bias=bias, entered=entered, attended=attended, cover=cover)

    def encode_image(self, image: Tensor, kind: int = 1, patches: Tensor | None = None) -> Encoded:
        """Images (B, 3, H, W).

        Args:
            image: normalised pixels.
            kind: row of the type table: 2 is the second image of a pair.
            patches: (B, n) the patches that the tower sees; None: all.
        """
        read = self.connector.read["image"]
        states = self.vit_model.visual(image, read, patches)
        projected = self._project("image", states, kind)
        feature = projected[-1][:, 0] if self.contrastive_source == "projected" else states[-1][:, 0]
        return Encoded(self.connector.prepare("image", projected), None, feature)

    def _project(self, side: Side, states: list[Tensor], kind: int) -> list[Tensor]:
        """States of a tower to width D, with the type embedding."""
        transform, kind_vector = getattr(self, f"cross_modal_{side}_transform"), self.token_type_embeddings.weight[kind]
        layers = transform if isinstance(transform, nn.ModuleList) else [transform] * len(states)
        return [F.linear(x, layer.weight, layer.bias + kind_vector) for layer, x in zip(layers, states, strict=True)]

    def _padding_bias(self, mask: Tensor, full: int) -> Tensor | None:
        """(B, L) of the text's tokens in adaptive managers of the image.

        Padding is out (-inf) or, unmasked, stands for as many equal tokens as were trimmed: + log(padding / left of it).
        """
        if not self.connector.unmasked_padding:
            return torch.zeros(mask.shape, device=mask.device).masked_fill_(mask == 0, -torch.inf)
        return None if mask.shape[1] == full else _stand_in(mask, full - mask.shape[1])

    # ---- cross-modal encoder ----------------------------------------------------------------------------------------

    def start(self, side: Side, encoded: Encoded) -> Encoded:
        """With what the first cross-modal layer computes before the modalities meet: for one text or image in many pairs."""
        entered = self.connector(side, 0, encoded.experts, [], None)
        attended = self._layers(side)[0].attention(entered, entered, encoded.mask)
        return encoded._replace(entered=entered, attended=attended)

    def fuse(self, text: Encoded, image: Encoded, read: Read = "all", levels: int | None = None) -> Fused:
        """Join B texts with B images.

        Args:
            text: see :meth:`encode_text`.
            image: see :meth:`encode_image`.
            read: what is read of the last layer: ``text`` and ``image`` leave the other modality's last layer out, ``first``
                computes token 0 alone of both.
            levels: number of layers to run, at least 1; None: all.
        """
        texts: list[Tensor] = []
        images: list[Tensor] = []
        last = (self.levels if levels is None else levels) - 1
        entities = text.entities
        for level in range(last + 1):
            x, y = text.entered, image.entered
            if level or x is None or y is None:
                # At level 0 neither modality has an output yet.
                other_text, other_image = (texts[-1], images[-1]) if level else (None, None)
                x = self.connector("text", level, text.experts, texts, other_image)
                y = self.connector("image", level, image.experts, images, other_text, text.bias)
            rows = 1 if level == last and read == "first" else None
            done = (text.attended, image.attended) if level == 0 else (None, None)
            if level < last or read != "image":
                out, entities = self._text_layer(level, x, y, text, rows, done[0], entities)
                texts.append(out)
            if level < last or read != "text":
                layer = self._layers("image")[level]
                images.append(layer(y, context=x, context_mask=text.mask, rows=rows, attended=done[1]))
        if read == "text":
            return Fused(texts[-1], None, None)
        if read == "image":
            return Fused(None, images[-1], None)
        return Fused(texts[-1], images[-1], self.pool(texts[-1], images[-1]))

    def _text_layer(
        self,
        level: int,
        x: Tensor,
        image: Tensor,
        text: Encoded,
        rows: int | None,
        attended: Tensor | None,
        entities: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The output of a cross-modal text layer, and the entities (B, M, K) that enter the next one."""
        return self._layers("text")[level](x, text.mask, context=image, rows=rows, attended=attended), entities

    def _layers(self, side: Side) -> nn.ModuleList:
        return getattr(self, f"cross_modal_{side}_layers")

    def pool(self, text: Tensor, image: Tensor) -> Tensor:
        """Token 0 of both (B, 2D), the text's first."""
        pairs = ((self.cross_modal_text_pooler, text), (self.cross_modal_image_pooler, image))
        return torch.cat([torch.tanh(pooler.dense(x[:, 0])) for pooler, x in pairs], dim=-1)

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor) -> Fused:
        """Token ids and mask (B, L), images (B, 3, H, W)."""
        return self.fuse(self.encode_text(ids, mask, trim=False), self.encode_image(image))

    # ---- contrastive space ------------------------------------------------------------------------------------------

    def embed_text(self, text: Encoded) -> Tensor:
        """(B, E) unit vectors of texts."""
        return F.normalize(self.itc_text_head.fc(text.feature).float(), dim=-1)

    def embed_image(self, image: Encoded) -> Tensor:
        """(B, E) unit vectors of images."""
        return F.normalize(self.itc_image_head.fc(image.feature).float(), dim=-1)

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        self.temperature.clamp_(*TEMPERATURE_RANGE)

    @torch.no_grad()
    def rank_like_match(self) -> None:
        """Start the head of ``rank`` from the matching head's row for "match"."""
        self.rank_output.weight.copy_(self.itm_score.fc.weight[1:])
        self.rank_output.bias.copy_(self.itm_score.fc.bias[1:])


def trimmed(ids: Tensor, mask: Tensor, spare: int = 0, exact: bool = True) -> tuple[Tensor, Tensor]:
    """Cut a batch (B, L) of right-padded texts to its longest text and ``spare`` columns of padding.

    Masked padding is never noticed. Unmasked padding (``spare`` 1) is, and all padding of a text is alike as long as nothing is
    drawn at random: with ``exact`` False, in training, nothing is cut then.
    """
    if spare and not exact:
        return ids, mask
    longest = max(int(mask.sum(dim=1).max()), 1) + spare
    if longest >= ids.shape[1] or bool(mask[:, longest:].any()):
        return ids, mask
    return ids[:, :longest], mask[:, :longest]


def _stand_in(mask: Tensor, cut: int) -> Tensor:
    """(B, L) log(padding before ``cut`` columns of it were cut / padding left) at the padding of ``mask``, 0 at tokens."""
    pads = mask == 0
    left = pads.sum(dim=1, keepdim=True)
    return torch.where(pads, ((left + cut) / left.clamp(min=1)).log(), 0.0)


def _head(width: int, out: int) -> nn.Module:
    head = nn.Module()
    head.fc = nn.Linear(width, out)
    return head


def init_linear(module: nn.Module, std: float) -> None:
    """Linear weights normal with deviation ``std``, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
