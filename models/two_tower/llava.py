"""LLaVA-OneVision with managers in its visual stream (arXiv 2506.11515), on transformers' classes.

The vision encoder runs once: its last state becomes the visual tokens, as without managers, and several of its hidden states
become the experts, by the same projector and in the same arrangement of tiles. Shapes: B samples, S tokens of a sequence, L
visual tokens of a sample, P patches of a tile, N experts, K managers, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig

from models.two_tower.tiles import MAX_TILES, grid_of, pinpoints
from models.two_tower.visual_stream import Kind, StreamManagers

GridType = Literal["all", "main", "grid"]
Size = Sequence[int]  # height and width of an image, pixels
Span = Sequence[int]  # the first visual token of a sample and their number, which is 0 for a text alone


class Prepared(NamedTuple):
    """What a forward pass of the language model takes: ``embeds`` (B, S, D) with the visual tokens in place; ``experts``
    (B, N, L, D), or the sums (B, K, L, D) of static managers; ``span`` (B, L): places of the visual tokens that managers
    change, -1 for none. None without managers."""

    embeds: Tensor
    experts: Tensor | None
    span: Tensor | None


class ManagedLlava(nn.Module):
    """The model and its managers.

    Args:
        llava: of transformers, with a user's weights or random ones.
        managers: for the width of its language model; None: LLaVA-OneVision as it is.
        expert_layers: hidden states of the vision encoder (0: its embeddings) that are the experts, as many as the managers
            mix; officially 13 to 25 of SigLIP's 26 layers.
        grid_type: which visual tokens get the managers' sums: ``all``; ``main``: of the whole image; ``grid``: of its tiles.
        tiled: images are shown as a whole and in tiles on one of the grids of the configuration of ``llava``, lines end with a
            learnt token; False: as a whole alone, without such ends.
        fold: sum the experts of static managers before the tiles are arranged, which is exact and saves time and memory.
    """

    def __init__(
        self,
        llava: LlavaOnevisionForConditionalGeneration,
        managers: StreamManagers | None,
        expert_layers: Sequence[int],
        grid_type: GridType = "all",
        tiled: bool = True,
        fold: bool = True,
    ):
        super().__init__()
        if managers is not None and len(expert_layers) != len(managers.manager_layer_embedding):
            raise ValueError(
                f"{len(expert_layers)} expert layers for managers of {len(managers.manager_layer_embedding)} experts"
            )
        self.llava, self.managers = llava, managers
        self.expert_layers, self.grid_type, self.tiled = tuple(expert_layers), grid_type, tiled
        self.folds = fold and managers is not None and managers.foldable

    def prepare(self, ids: Tensor, tiles: Sequence[Tensor], sizes: Sequence[Size], spans: Sequence[Span]) -> Prepared:
        """Embeds the tokens, and puts each sample's visual tokens into their places.

        Args:
            ids: (B, S) token ids, of any value at visual places.
            tiles: B times (T, 3, H, W): the whole image, then its tiles; T is 0 for a text alone.
            sizes: of the B images before they were resized, which decide on the arrangement; of any value for a text alone.
            spans: B times the first visual token and how many of them are not cut off.
        """
        embeds = self.llava.get_input_embeddings()(ids)
        with_image = [row for row, of_image in enumerate(tiles) if len(of_image)]
        if with_image:
            packed = self._encode([tiles[row] for row in with_image], [sizes[row] for row in with_image])
            of_rows = [packed[0][:0]] * len(ids)
            for row, of_image in zip(with_image, packed, strict=True):
                of_rows[row] = of_image
        else:  # every parameter gets a gradient, as in a batch with images: ranks of a distributed run wait for it
            (blank,) = self._encode(*self._blank(embeds))
            embeds = embeds + 0 * blank.sum()
            of_rows = [0 * blank[:1]] * len(ids)
        if any(count > len(of_row) for (_, count), of_row in zip(spans, of_rows, strict=True) if count):
            raise ValueError(f"spans {list(spans)} for images of {[len(of_row) for of_row in of_rows]} visual tokens")
        first, counts = torch.tensor([list(span) for span in spans], device=ids.device).T[..., None]
        place = torch.arange(ids.shape[1], device=ids.device)
        visual = (place >= first) & (place < first + counts)
        seen = torch.cat([of_row[:count, -1] for of_row, (_, count) in zip(of_rows, spans, strict=True)])
        embeds = embeds.masked_scatter(visual[..., None], seen.to(embeds.dtype))
        if self.managers is None:
            return Prepared(embeds, None, None)
        experts = pad_sequence([of_row[:, :-1] for of_row in of_rows], batch_first=True).transpose(1, 2)
        order = torch.arange(experts.shape[2], device=ids.device)
        return Prepared(embeds, experts, torch.where((order < counts) & self._managed(order), first + order, -1))

    def _encode(self, tiles: Sequence[Tensor], sizes: Sequence[Size]) -> list[Tensor]:
        """(L, N + 1, D) or (L, K + 1, D) of each image: the experts or their sums, and the visual tokens in the last place."""
        model, config = self.llava.model, self.llava.config
        states = model.vision_tower(torch.cat(list(tiles)), output_hidden_states=True).hidden_states
        newline, layers = model.image_newline[None], self.expert_layers if self.managers is not None else ()
        projected = model.multi_modal_projector(torch.stack([states[i] for i in (*layers, config.vision_feature_layer)], dim=1))
        if self.managers is not None:
            mixed, ends = self.managers.experts(projected[:, :-1]), newline.expand(len(layers), -1)
            if self.folds:
                mixed, weights = self.managers.fold(mixed)
                ends = weights * newline
            projected, newline = torch.cat([mixed.to(projected.dtype), projected[:, -1:]], dim=1), torch.cat([ends, newline])
        joined = projected.transpose(1, 2).flatten(2)  # the channels of all, since what arranges tokens treats channels alike
        of_images = joined.split([len(of_image) for of_image in tiles])
        if self.tiled:
            ratio = f"anyres_max_{MAX_TILES}"
            packed = model.pack_image_features(of_images, [tuple(size) for size in sizes], newline.flatten(), ratio)[0]
        else:
            packed = [of_image[0] for of_image in of_images]
        return [of_image.unflatten(-1, (-1, newline.shape[-1])) for of_image in packed]

    def _blank(self, like: Tensor) -> tuple[list[Tensor], list[Size]]:
        """The tiles and the size of one image of zeros."""
        side, count = self.llava.config.vision_config.image_size, 1
        if self.tiled:
            rows, columns = grid_of((side, side), self.llava.config.image_grid_pinpoints, side)
            count += rows * columns
        return [like.new_zeros(count, 3, side, side)], [(side, side)]

    def _managed(self, order: Tensor) -> Tensor:
        """Whether managers change the visual tokens of these numbers."""
        config = self.llava.config.vision_config
        of_whole = order < (config.image_size // config.patch_size) ** 2
        return {"all": torch.ones_like(of_whole), "main": of_whole, "grid": ~of_whole}[self.grid_type]

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        tiles: Sequence[Tensor],
        sizes: Sequence[Size],
        spans: Sequence[Span],
        query: Tensor | None = None,
    ) -> Tensor:
        """(B, S, D) last states of the language model, which :meth:`logits` takes.

        Args:
            ids, tiles, sizes, spans: see :meth:`prepare`.
            mask: (B, S), 1 at tokens.
            query: (B, Q) places of the question's tokens for adaptive managers, -1 behind the last; without any, a sample's
                visual tokens take their place.
        """
        prepared = self.prepare(ids, tiles, sizes, spans)
        with self._attached(prepared, query):
            model = self.llava.model.language_model
            return model(inputs_embeds=prepared.embeds, attention_mask=mask, use_cache=False).last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """(..., vocabulary) of states (..., D)."""
        return self.llava.lm_head(states)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        mask: Tensor,
        tiles: Sequence[Tensor],
        sizes: Sequence[Size],
        spans: Sequence[Span],
        query: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """New token ids (B, n); managers act on the prompt, whose states the later steps read from the cache.

        Args:
            ids, mask, tiles, sizes, spans, query: see :meth:`forward`; prompts of one length.
            options: of transformers' ``generate``.
        """
        prepared = self.prepare(ids, tiles, sizes, spans)
        with self._attached(prepared, query):
            return self.llava.generate(inputs_embeds=prepared.embeds, attention_mask=mask, **options)

    def _attached(self, prepared: Prepared, query: Tensor | None) -> AbstractContextManager:
        if self.managers is None:
            return nullcontext()
        if query is not None and not self.managers.foldable:
            length = max(prepared.span.shape[1], query.shape[1])
            span, query = (F.pad(part, (0, length - part.shape[1]), value=-1) for part in (prepared.span, query))
            query = torch.where((query < 0).all(dim=1, keepdim=True), span, query)
            query[:, 0].clamp_(min=0)  # a text alone, whose sums go nowhere
        layers = self.llava.model.language_model.layers
        return self.managers.attached(layers, prepared.experts, prepared.span, query, self.folds)


def managed_llava(
    vocab_size: int = 151_936,
    image_size: int = 384,
    patch_size: int = 14,
    grids: Sequence[Sequence[int]] | int | None = None,
    managed: bool = True,
    kind: Kind = "static",
    grid_type: GridType = "all",
    fold: bool = True,
    vision_width: int = 1152,
    vision_layers: int = 26,
    vision_heads: int = 16,
    vision_intermediate: int = 4304,
    width: int = 896,
    layers: int = 24,
    heads: int = 14,
    key_value_heads: int = 2,
    intermediate: int = 4864,
    rows: int = 0,
    tied: bool = True,
    every: int = 4,
    init_std: float = 0.02,
) -> ManagedLlava:
    """A LLaVA-OneVision with random weights, by default of the size of SigLIP so400m without its last layer and Qwen2-0.5B,
    with managers that mix the upper half of the vision encoder's layers.

    Args:
        vocab_size: token ids of the tokenizer.
        image_size, patch_size: sides of a tile and of a patch, pixels.
        grids: see :data:`~models.two_tower.tiles.Grids`; None: images are shown as a whole alone.
        managed: False: without managers.
        kind, grid_type, fold: see :class:`StreamManagers` and :class:`ManagedLlava`.
        vision_width, vision_layers, vision_heads, vision_intermediate: of the vision encoder.
        width, layers, heads, key_value_heads, intermediate: of the language model.
        rows: of its vocabulary, where it has more of them than the tokenizer has ids.
        tied: whether its output weights are those of its input.
        every: a manager stands before every so many layers of the language model.
        init_std: of its initial weights.
    """
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=vision_width,
            intermediate_size=vision_intermediate,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=image_size,
            patch_size=patch_size,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            hidden_size=width,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            vocab_size=max(rows, vocab_size),
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            tie_word_embeddings=tied,
            initializer_range=init_std,
        ),
        tie_word_embeddings=tied,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=None if grids is None else pinpoints(grids, image_size),
        vision_aspect_ratio=f"anyres_max_{MAX_TILES}",
    )
    experts = range(vision_layers // 2, vision_layers)
    managers = StreamManagers(width, len(experts), range(0, layers, every), kind) if managed else None
    return ManagedLlava(
        LlavaOnevisionForConditionalGeneration(config), managers, experts, grid_type, tiled=grids is not None, fold=fold
    )
