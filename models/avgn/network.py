"""AVGN, the audio-visual glance network (arXiv 2308.09322): glance everywhere, look closely where it matters.

Letters in comments: B videos, T snippets, K chosen ones, S side of a frame, P of a patch, n of a glance's map.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from models.avgn.aespa import AESPA
from models.avgn.classifier import CumulativeClassifier
from models.avgn.encoders import map_side
from models.avgn.exits import ALWAYS, Criterion, exit_confidence
from models.avgn.policy import PolicyNetwork, crop_patches
from models.avgn.saliency import AVTeST, Order, Saliency, top_snippets, uniform_snippets
from models.errors import UserError

Select = Literal["saliency", "saliency_visual", "saliency_audio", "uniform", "random"]


class Glance(NamedTuple):
    """``maps`` (B, T, Cv, n, n), pooled ``visual`` (B, T, Cv) and ``audio`` (B, T, Ca), ``heard`` (B,): is there sound."""

    maps: Tensor
    visual: Tensor
    audio: Tensor
    heard: Tensor


class Prediction(NamedTuple):
    """``logits`` (B, K, C) after each step, ``indices`` (B, K) of the snippets, ``actions`` (B, K, 2) places of the patches
    (the middle where whole frames are looked at), ``saliency`` (B, T) or None where nothing had to be scored."""

    logits: Tensor
    indices: Tensor
    actions: Tensor
    saliency: Tensor | None


class Exits(NamedTuple):
    """``logits`` (B, C) at the step of leaving, ``steps`` (B,) of leaving, from 0."""

    logits: Tensor
    steps: Tensor


class AVGN(nn.Module):
    """The network and the settings it looks with; settings may be changed on a trained network, and per call.

    Args:
        global_CNN: map encoder of frames.
        audio_CNN: map encoder of spectrograms.
        local_CNN: vector encoder of patches.
        front_end: sound (..., n) to spectrograms.
        num_classes: C.
        image_size: S.
        patch_size: P; equal to S looks at whole frames, and then no policy runs.
        num_selected: K; T looks at every snippet.
        max_steps: prediction heads, null for as many as ``num_selected``.
        glance_size: frames are shrunk to this side before the glance; null glances at S (AdaFocusV2).
        select: who chooses: AV-TeST, AV-TeST without hearing or without seeing, equal distances, or chance.
        order: how the chosen snippets reach the classifier; training and use must agree.
        aespa: "none" gives the glance's own map to the policy (AdaFocusV2).
        policy: "network", or patches at "random" places or the "centre".
        modality: "visual" never listens: no audio encoder runs.
        dim: width of the tokens of AV-TeST and AESPA.
        layers: of AV-TeST.
        heads: of AV-TeST and AESPA.
        max_snippets: length of AV-TeST's position table.
        policy_hidden: H.
        policy_start: where an untrained policy looks; "chance" is AdaFocusV2's.
        mlp_width: of the classifier.
        dropout: before the heads of the classifier.
        aux_dropout: before the auxiliary classifiers.
        detach_inputs: the saliency loss does not reach the encoders.

    Raises UserError where the sizes do not fit together.
    """

    def __init__(
        self,
        global_CNN: nn.Module,
        audio_CNN: nn.Module,
        local_CNN: nn.Module,
        front_end: nn.Module,
        num_classes: int,
        image_size: int = 224,
        patch_size: int = 128,
        num_selected: int = 8,
        max_steps: int | None = None,
        glance_size: int | None = None,
        select: Select = "saliency",
        order: Order = "temporal",
        aespa: Literal["full", "none"] = "full",
        policy: Literal["network", "random", "centre"] = "network",
        modality: Literal["audio_visual", "visual"] = "audio_visual",
        dim: int = 256,
        layers: int = 2,
        heads: int = 4,
        max_snippets: int = 16,
        policy_hidden: int = 512,
        policy_start: Literal["middle", "chance"] = "middle",
        mlp_width: int = 4096,
        dropout: float = 0.2,
        aux_dropout: float = 0.2,
        detach_inputs: bool = True,
    ):
        super().__init__()
        if patch_size > image_size:
            raise UserError(f"module.model.patch_size={patch_size} does not fit into frames of image_size={image_size}.")
        if dim % heads:
            raise UserError(f"module.model.dim={dim} does not divide into heads={heads}.")
        self.image_size, self.patch_size, self.glance_size = image_size, patch_size, glance_size
        self.num_selected, self.order, self.select = num_selected, order, select
        self.policy_form, self.modality, self.detach_inputs = policy, modality, detach_inputs
        self.global_CNN, self.audio_CNN, self.local_CNN, self.front_end = global_CNN, audio_CNN, local_CNN, front_end
        visual, audio, local = global_CNN.out_dim, audio_CNN.out_dim, local_CNN.out_dim
        positions = map_side(global_CNN, glance_size or image_size) ** 2
        self.audio_missing = nn.Parameter(torch.zeros(audio))
        self.avtest = AVTeST(visual, audio, dim, layers, heads, max_snippets=max_snippets)
        self.aespa = AESPA(visual, audio, dim, heads, positions) if aespa == "full" else None
        self.policy = PolicyNetwork(dim if self.aespa else visual, positions, policy_hidden, policy_start)
        steps = max_steps or num_selected
        self.classifier = CumulativeClassifier(visual + audio + local, num_classes, steps, mlp_width, dropout)
        self.global_fc = nn.Sequential(nn.Dropout(aux_dropout), nn.Linear(visual, num_classes))
        self.audio_fc = nn.Sequential(nn.Dropout(aux_dropout), nn.Linear(audio, num_classes))
        self.local_fc = nn.Sequential(nn.Dropout(aux_dropout), nn.Linear(local, num_classes))
        self.register_buffer("pixel_mean", torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None] * 255, persistent=False)
        self.register_buffer("pixel_std", torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None] * 255, persistent=False)

    # ---- parts, in the order in which they run ---------------------------------------------------------------------

    def pixels(self, images: Tensor) -> Tensor:
        """uint8 RGB (..., 3, H, W) normalised with ImageNet's statistics; floating point passes as it is."""
        return images if images.is_floating_point() else (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std

    def glance(self, frames: Tensor, clips: Tensor, heard: Tensor, silent: bool | None = None) -> Glance:
        """Frames (B, T, 3, S, S), sound (B, T, n) in [-1, 1] and ``heard`` (B,) bool, False where a video has no sound.

        ``silent``: see :meth:`hear`.
        """
        batch = frames.shape[:2]
        images = self.pixels(frames.flatten(0, 1))
        if self.glance_size:
            images = F.interpolate(images, (self.glance_size,) * 2, mode="bilinear", antialias=True)
        maps = self.global_CNN(images)
        if self.modality == "visual":
            heard, silent = torch.zeros_like(heard), True
        audio = self.hear(clips, heard, silent)
        return Glance(maps.unflatten(0, batch), maps.mean(dim=(2, 3)).unflatten(0, batch), audio, heard)

    def hear(self, clips: Tensor, heard: Tensor, silent: bool | None = None) -> Tensor:
        """Audio features (B, T, Ca) of sound (B, T, n); the learnt stand-in where there is none. Silence costs nothing.

        ``silent``: whether no video of the batch has sound; None asks ``heard``, which waits for a GPU.
        """
        batch = clips.shape[:2]
        if not bool(heard.any()) if silent is None else silent:
            return self.audio_missing.expand(*batch, -1)
        spectrograms = self.front_end(clips) * heard[:, None, None, None]
        audio = self.audio_CNN(spectrograms.flatten(0, 1)[:, None]).mean(dim=(2, 3)).unflatten(0, batch)
        return torch.where(heard[:, None, None], audio, self.audio_missing)

    def saliency(self, glance: Glance, select: Select = "saliency") -> Saliency:
        """Scores of the snippets."""
        visual, audio, heard = glance.visual, glance.audio, glance.heard
        if self.detach_inputs:
            visual, audio = visual.detach(), audio.detach()
        if select == "saliency_visual":
            heard = torch.zeros_like(heard)
        audio = torch.where(heard[:, None, None], audio, self.audio_missing)
        deaf = ~heard[:, None].expand(visual.shape[:2])
        blind = torch.zeros_like(deaf)
        if select == "saliency_audio":
            visual, blind = torch.zeros_like(visual), ~deaf  # without sound the positions alone are left
        ignore = torch.cat([blind, deaf], dim=1)
        # A mask of nothing changes nothing; in training a GPU is not asked whether it is one.
        masked = self.training and ignore.is_cuda or bool(ignore.any())
        return self.avtest(visual, audio, ignore if masked else None)

    def look(self, glance: Glance, indices: Tensor) -> Tensor:
        """Actions (B, K, 2) of the policy for the chosen snippets (B, K), in their order."""
        ascending, place = indices.sort(dim=1)
        maps, audio = take(glance.maps, ascending), take(glance.audio, ascending)
        if self.training:
            maps, audio = maps.detach(), audio.detach()
        maps = maps.flatten(0, 1)
        if self.aespa is not None:
            maps = self.aespa(maps, audio.flatten(0, 1))
        actions = self.policy(maps, indices.shape[1])
        return take(actions, place.argsort(dim=1))

    def patches(self, frames: Tensor, indices: Tensor, actions: Tensor, patch_size: int | None = None) -> Tensor:
        """Normalised patches (B*K, 3, P, P); frames that are uint8 are cut first and normalised after."""
        chosen = take(frames, indices).flatten(0, 1)
        return self.pixels_of_patch(crop_patches(chosen, actions.flatten(0, 1), patch_size or self.patch_size), frames)

    def pixels_of_patch(self, patch: Tensor, frames: Tensor) -> Tensor:
        if frames.is_floating_point():
            return patch
        return (patch.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std

    def fuse(self, glance: Glance, indices: Tensor, local: Tensor) -> Tensor:
        """What the classifier takes (B, K, Cv + Ca + Cl): visual, audio and local features of the chosen snippets."""
        return torch.cat([take(glance.visual, indices), take(glance.audio, indices), local], dim=-1)

    # ---- whole passes of evaluation ----------------------------------------------------------------------------------

    def choose(self, glance: Glance, count: int, select: Select, order: Order) -> tuple[Tensor, Tensor | None]:
        """(indices (B, K), saliency (B, T) or None). Nothing is scored where all snippets are taken in temporal order."""
        batch, snippets = glance.visual.shape[:2]
        device = glance.visual.device
        if select == "uniform" or (count >= snippets and order == "temporal"):
            return uniform_snippets(batch, snippets, min(count, snippets), device), None
        if select == "random":
            return top_snippets(torch.rand(batch, snippets, device=device), count, order), None
        logits = self.saliency(glance, select).logits
        return top_snippets(logits, count, order), logits

    def place(self, glance: Glance, indices: Tensor, patch_size: int) -> Tensor:
        """Actions (B, K, 2) by the configured form of the policy."""
        if patch_size == self.image_size or self.policy_form == "centre":
            return torch.full((*indices.shape, 2), 0.5, device=indices.device)
        if self.policy_form == "random":
            return torch.rand(*indices.shape, 2, device=indices.device)
        return self.look(glance, indices)

    def forward(self, frames: Tensor, clips: Tensor, heard: Tensor, silent: bool | None = None) -> Prediction:
        """Arguments: see :meth:`glance`."""
        return self.decide(frames, self.glance(frames, clips, heard, silent))

    def decide(self, frames: Tensor, glance: Glance) -> Prediction:
        """Everything after the glance."""
        indices, saliency = self.choose(glance, self.num_selected, self.select, self.order)
        actions = self.place(glance, indices, self.patch_size)
        local = self.local_CNN(self.patches(frames, indices, actions)).unflatten(0, indices.shape)
        return Prediction(self.classifier(self.fuse(glance, indices, local)), indices, actions, saliency)

    @contextmanager
    def using(self, **settings: Any) -> Iterator[None]:
        """Other settings, for a while: ``num_selected``, ``patch_size``, ``select``, ``order``, ``policy_form``."""
        before = {name: getattr(self, name) for name in settings}
        try:
            for name, value in settings.items():
                setattr(self, name, value)
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def early_exit(
        self, frames: Tensor, clips: Tensor, heard: Tensor, thresholds: Tensor, criterion: Criterion = "confidence"
    ) -> Exits:
        """One step for all videos still in doubt, then on with those alone: the batch shrinks as videos leave.

        ``thresholds`` (K,) as :func:`models.avgn.exits.exit_thresholds` finds them.
        """
        glance = self.glance(frames, clips, heard)
        indices, _ = self.choose(glance, len(thresholds), self.select, self.order)
        actions = self.place(glance, indices, self.patch_size)
        live = torch.arange(len(frames), device=frames.device)
        logits = torch.zeros(len(frames), self.classifier.heads.bias.shape[1], device=frames.device)
        steps = torch.zeros(len(frames), dtype=torch.long, device=frames.device)
        state = None
        for step, threshold in enumerate(thresholds.tolist()):
            now = indices[live, step, None]
            patch = self.pixels_of_patch(crop_patches(frames[live, now[:, 0]], actions[live, step], self.patch_size), frames)
            features = [glance.visual[live, now[:, 0]], glance.audio[live, now[:, 0]], self.local_CNN(patch)]
            step_logits, state = self.classifier.step(torch.cat(features, dim=-1), step, state)
            sure = exit_confidence(step_logits, criterion) >= threshold
            logits[live[sure]], steps[live[sure]] = step_logits[sure].to(logits.dtype), step
            live, state = live[~sure], state[~sure]
            if threshold == ALWAYS or not len(live):
                break
        return Exits(logits, steps)


def take(values: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` (B, K) of values (B, T, ...): (B, K, ...)."""
    return values[torch.arange(len(values), device=values.device)[:, None], indices]
