"""Student and teacher of DINOv2 and one step of their objectives (arXiv 2304.07193; continued on chest X-rays: 2401.10815)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor, nn

from models.optim.clipping import clip_together_
from models.optim.ema import ema_update_
from models.rad_dino.backbone import DinoViT
from models.rad_dino.head import DinoHead
from models.rad_dino.losses import CentredTargets, koleo, prototype_loss, sinkhorn_knopp

VIEWS = 2  # global crops of an image


class StudentAndTeacher(nn.Module):
    """The student learns by gradient, the teacher is its exponential moving average. Parameter names are the official ones.

    Args:
        backbone: factory of the encoder.
        dino_head: factory ``(width) -> head`` of class tokens.
        ibot_head: the same for patches; None: they share the head of the class tokens.
        centring: how teacher logits become targets.
        patch_objective: whether there is the iBOT term.
    """

    def __init__(
        self,
        backbone: Callable[[], DinoViT],
        dino_head: Callable[[int], DinoHead],
        ibot_head: Callable[[int], DinoHead] | None = None,
        centring: Literal["sinkhorn_knopp", "centering"] = "sinkhorn_knopp",
        patch_objective: bool = True,
    ):
        super().__init__()
        encoder = backbone()
        parts: dict[str, nn.Module] = {"backbone": encoder, "dino_head": dino_head(encoder.dim)}
        if ibot_head is not None and patch_objective:
            parts["ibot_head"] = ibot_head(encoder.dim)
        self.student = nn.ModuleDict(parts)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.centring, self.patch_objective = centring, patch_objective
        widths = [self.head(self.student, patches).last_layer.weight_g.shape[0] for patches in (False, True)]
        self.dino_loss, self.ibot_patch_loss = CentredTargets((1, widths[0])), CentredTargets((1, 1, widths[1]))
        self.train()

    @staticmethod
    def head(network: nn.ModuleDict, patches: bool) -> DinoHead:
        """The head of class tokens or of patches."""
        return cast(DinoHead, network["ibot_head" if patches and "ibot_head" in network else "dino_head"])

    def train(self, mode: bool = True) -> StudentAndTeacher:
        """The teacher stays in eval mode: no stochastic depth."""
        super().train(mode)
        self.teacher.eval()
        return self

    def losses(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None,
        masks: Tensor,
        mask_indices: Tensor,
        mask_weights: Tensor,
        temperature: float,
        targets_move: bool = True,
    ) -> dict[str, Tensor]:
        """The terms of one step, unweighted: ``dino_local``, ``dino_global``, ``koleo`` (summed over both views) and ``ibot``.

        Args:
            global_crops: (2B, 3, H, W), the first view of all images, then the second.
            local_crops: (L * B, 3, h, w), crop by crop; None: no local crops.
            masks: (2B, N) bool, True where the student sees the mask token.
            mask_indices: (n,) the masked places of the flattened ``masks``.
            mask_weights: (n,) one over the number of masked patches of the place's crop.
            temperature: of the teacher.
            targets_move: whether the rows move the centres; not on held-out splits.
        """
        images = len(global_crops) // VIEWS
        class_targets, patch_targets = self._targets(global_crops, mask_indices, temperature, targets_move)
        crops, crop_masks = [global_crops], [masks]
        if local_crops is not None:
            crops, crop_masks = [*crops, local_crops], [*crop_masks, None]
        outputs = cast(DinoViT, self.student["backbone"]).forward_crops(crops, crop_masks)
        head = self.head(self.student, patches=False)
        units = head.unit(torch.cat([output.cls for output in outputs])).split([len(output.cls) for output in outputs])
        prototypes = head.last_layer.weight
        count = 0 if local_crops is None else len(local_crops) // images
        terms = VIEWS + max(VIEWS * count, 1)
        even = class_targets.new_full((len(global_crops),), VIEWS / (len(global_crops) * terms))
        losses = {"dino_global": prototype_loss(units[0], prototypes, class_targets, even)}
        if count:
            # Linear in the targets: all crops of an image meet the sum of both views.
            both = class_targets.unflatten(0, (VIEWS, images)).sum(dim=0)
            target_of = torch.arange(images, device=both.device).repeat(count)
            even = even.new_full((len(local_crops),), 1 / (images * terms))
            losses["dino_local"] = prototype_loss(units[1], prototypes, both, even, target_of=target_of)
        losses["koleo"] = torch.stack([koleo(view) for view in outputs[0].cls.chunk(VIEWS)]).sum()
        if self.patch_objective:
            masked = outputs[0].patches.flatten(0, 1)[mask_indices]
            head = self.head(self.student, patches=True)
            losses["ibot"] = prototype_loss(
                head.unit(masked), head.last_layer.weight, patch_targets, mask_weights / len(global_crops)
            )
        return losses

    @torch.no_grad()
    def _targets(self, crops: Tensor, mask_indices: Tensor, temperature: float, move: bool) -> tuple[Tensor, Tensor | None]:
        """Targets of the class tokens, views swapped so that each row stands at the view that learns from it, and of the masked
        patches."""
        output = self.teacher["backbone"](crops)
        swapped = torch.cat(output.cls.chunk(VIEWS)[::-1])
        logits = self.head(self.teacher, patches=False)(swapped)
        patch_logits = None
        if self.patch_objective:
            patch_logits = self.head(self.teacher, patches=True)(output.patches.flatten(0, 1)[mask_indices])
        if self.centring == "sinkhorn_knopp":
            targets = sinkhorn_knopp(logits, temperature, overwrite=True)
            return targets, None if patch_logits is None else sinkhorn_knopp(patch_logits, temperature, overwrite=True)
        targets = self.dino_loss(logits, temperature, move)
        return targets, None if patch_logits is None else self.ibot_patch_loss(patch_logits, temperature, move)

    def update_teacher(self, momentum: float) -> None:
        """Move the teacher's backbone and heads towards the student's."""
        ema_update_(self.teacher.parameters(), self.student.parameters(), momentum)

    def copy_student(self) -> None:
        """Make the teacher equal to the student, as at the beginning of a training."""
        with torch.no_grad():
            for average, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                average.copy_(value)

    def clip_gradients(self, max_norm: float) -> None:
        """Limit the L2 norm of the gradients of each part of the student (backbone, each head) on its own."""
        for part in self.student.values():
            clip_together_(part.parameters(), max_norm)
