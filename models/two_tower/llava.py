"""LLaVA-OneVision with managers in its visual stream (arXiv 2506.11515), on transformers' classes.

The vision encoder runs once: its last state becomes the visual tokens, as without managers, and several of its hidden states
become the experts, by the same projector and in the same arrangement of tiles. Shapes: B samples, S tokens of a sequence, L
visual tokens of a sample, N experts, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config, SiglipVisionConfig
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

from models.io import load_strictly
from models.two_tower.visual_stream import Kind, StreamManagers

GridType = Literal["all", "main", "grid"]


class Prepared(NamedTuple):
    """What a forward pass of the language model takes: ``embeds`` (B, S, D) with the visual tokens in place; ``experts``
    (B, N, L, D); ``span`` (B, L): places of the visual tokens that managers change, -1 for none."""

    embeds: Tensor
    experts: Tensor
    span: Tensor


class ManagedLlava(nn.Module):
    """The model and its managers.

    Args:
        llava: of transformers, with a user's weights or random ones.
        managers: for the width of its language model.
        expert_layers: hidden states of the vision encoder (0: its embeddings) that are the experts, as many as the managers
            mix; officially 13 to 25 of SigLIP's 26 layers.
        grid_type: which visual tokens get the managers' sums: ``all``; ``main``: of the whole image; ``grid``: of its tiles.
    """

    def __init__(
        self,
        llava: LlavaOnevisionForConditionalGeneration,
        managers: StreamManagers,
        expert_layers: Sequence[int],
        grid_type: GridType = "all",
    ):
        super().__init__()
        if len(expert_layers) != len(managers.manager_layer_embedding):
            raise ValueError(
                f"{len(expert_layers)} expert layers for managers of {len(managers.manager_layer_embedding)} experts"
            )
        self.llava, self.managers = llava, managers
        self.expert_layers, self.grid_type = tuple(expert_layers), grid_type

    def prepare(self, input_ids: Tensor, pixel_values: Tensor, image_sizes: Tensor) -> Prepared:
        """Token ids (B, S) with the image token at each visual place, one image per sample.

        Args:
            input_ids: (B, S).
            pixel_values: (B, P, 3, H, W): the whole image, then its tiles, padded to P; or (B, 1, 3, H, W) without tiles.
            image_sizes: (B, 2) height and width in pixels of the original image, which decide on the tiles.
        """
        model, config = self.llava.model, self.llava.config
        counts = [1] * len(pixel_values)
        if pixel_values.shape[1] > 1:
            side = config.vision_config.image_size
            counts = [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in image_sizes]
        tiles = torch.cat([tiles_of_image[:count] for tiles_of_image, count in zip(pixel_values, counts, strict=True)])
        states = model.vision_tower(tiles, output_hidden_states=True).hidden_states
        layers = (*self.expert_layers, config.vision_feature_layer)
        projected = model.multi_modal_projector(torch.stack([states[layer] for layer in layers]))
        projected = torch.cat([self.managers.experts(projected[:-1].transpose(0, 1)).transpose(0, 1), projected[-1:]])
        packed = [self._pack(of_layer.split(counts), image_sizes) for of_layer in projected]  # layer -> image -> (L, D)
        embeds = self.llava.get_input_embeddings()(input_ids)
        visual = input_ids == config.image_token_id
        embeds = embeds.masked_scatter(visual[..., None], torch.cat(packed[-1]).to(embeds.dtype))
        experts = pad_sequence([torch.stack(of_image, dim=1) for of_image in zip(*packed[:-1], strict=True)], batch_first=True)
        return Prepared(embeds, experts.transpose(1, 2), self._span(visual, experts.shape[1], states[0].shape[1]))

    def _pack(self, tiles: Sequence[Tensor], image_sizes: Tensor) -> list[Tensor]:
        model, config = self.llava.model, self.llava.config
        return model.pack_image_features(tiles, image_sizes, model.image_newline, config.vision_aspect_ratio)[0]

    def _span(self, visual: Tensor, most: int, of_base: int) -> Tensor:
        """(B, most) places of visual tokens in their order, -1 behind the last and where ``grid_type`` leaves one out."""
        order = visual.long().cumsum(dim=1) - 1
        span = torch.full((len(visual), most), -1, device=visual.device)
        rows, places = visual.nonzero(as_tuple=True)
        span[rows, order[rows, places]] = places
        if self.grid_type == "main":
            span[:, of_base:] = -1
        elif self.grid_type == "grid":
            span[:, :of_base] = -1
        return span

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        image_sizes: Tensor,
        query: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """What transformers' class returns.

        Args:
            input_ids, pixel_values, image_sizes: see :meth:`prepare`.
            attention_mask: (B, S).
            query: (B, Q) places of the question's tokens, for adaptive managers.
            options: of transformers' forward: ``labels``, ``use_cache`` ...
        """
        prepared = self.prepare(input_ids, pixel_values, image_sizes)
        with self._attached(prepared, query):
            return self.llava(inputs_embeds=prepared.embeds, attention_mask=attention_mask, **options)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        image_sizes: Tensor,
        query: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """New token ids (B, n); managers act on the prompt, whose states the later steps read from the cache."""
        prepared = self.prepare(input_ids, pixel_values, image_sizes)
        with self._attached(prepared, query):
            return self.llava.generate(inputs_embeds=prepared.embeds, attention_mask=attention_mask, **options)

    def _attached(self, prepared: Prepared, query: Tensor | None) -> Any:
        layers = self.llava.model.language_model.layers
        return self.managers.attached(layers, prepared.experts, prepared.span, query)

    def load_official_managers(self, weights: Mapping[str, Tensor]) -> None:
        """The managers of an official checkpoint (``model.manager...``). Raises CheckpointError."""
        named = {name.removeprefix("model."): value for name, value in weights.items()}
        load_strictly(self.managers, {name: value for name, value in named.items() if name.startswith("manager")})


def small_managed_llava(
    vocab_size: int,
    kind: Kind = "static",
    grid_type: GridType = "all",
    image_size: int = 32,
    patch_size: int = 8,
    vision_width: int = 64,
    vision_layers: int = 4,
    width: int = 64,
    layers: int = 4,
    heads: int = 4,
    every: int = 2,
    init_std: float = 0.1,
) -> ManagedLlava:
    """A LLaVA-OneVision with random weights: SigLIP and Qwen2 of a few layers, and managers for the upper half of the former.

    Args:
        vocab_size: word ids; the image token is one more.
        kind, grid_type: see :class:`StreamManagers` and :class:`ManagedLlava`.
        image_size: side of an image, pixels; tiles have half of it.
        patch_size: side of a patch, pixels.
        vision_width, vision_layers: of the vision encoder.
        width, layers: of the language model.
        heads: of both.
        every: a manager stands before every so many layers of the language model.
        init_std: of the initial weights.
    """
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=vision_width,
            intermediate_size=2 * vision_width,
            num_hidden_layers=vision_layers,
            num_attention_heads=heads,
            image_size=image_size // 2,
            patch_size=patch_size,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            vocab_size=vocab_size + 1,
            initializer_range=init_std,
        ),
        image_token_id=vocab_size,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[image_size, image_size]],
        vision_aspect_ratio="anyres_max_9",
    )
    experts = range(vision_layers // 2, vision_layers)
    managers = StreamManagers(width, len(experts), range(0, layers, every), kind)
    return ManagedLlava(LlavaOnevisionForConditionalGeneration(config), managers, experts, grid_type)
