"""LLaVA-OV-Manager at a size that trains from random weights: questions about images, answered by a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.base import BaseModule, StepOutput
from models import batch as keys
from models.batch import IGNORE_INDEX
from models.metrics.answers import answer_metrics
from models.two_tower.batch import QUESTION_IDS, QUESTION_MASK
from models.two_tower.llava import ManagedLlava


class LlavaManagerModule(BaseModule):
    """Trains a :class:`ManagedLlava` to say the answer behind ``image, question`` (arXiv 2506.11515, section 4).

    Every answer is one word of its own at the end of the vocabulary.

    Args:
        model: factory ``(vocab_size) -> ManagedLlava``.
        vocab_size, answers: left null they are taken from the data.
        grid: show each image as a whole and as two by two tiles of the encoder's size; False: as a whole alone.
        managers: False keeps the managers at zero: the model without them.
        stage: ``1`` trains the projector and the managers; ``2``: everything (officially stages 1.5 and 2).
        manager_lr_scale: of the managers over the learning rate; officially 5 in stage 2.
        vision_lr_scale: of the vision encoder; officially 0.2.
    """

    needs = (keys.IMAGE, QUESTION_IDS, QUESTION_MASK, keys.ANSWER)

    def __init__(
        self,
        model: Callable[..., ManagedLlava],
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        vocab_size: int | None = None,
        answers: int | None = None,
        grid: bool = True,
        managers: bool = True,
        stage: Literal[1, 2] = 2,
        manager_lr_scale: float = 5.0,
        vision_lr_scale: float = 0.2,
    ):
        super().__init__(optimizer, scheduler, loss_weights)
        self.words, self.answers, self.grid = vocab_size or 0, answers or 0, grid
        self.model = model(vocab_size=self.words + self.answers)
        self.manager_lr_scale, self.vision_lr_scale = manager_lr_scale, vision_lr_scale
        if stage == 1:
            self.model.llava.requires_grad_(False)
            self.model.llava.model.multi_modal_projector.requires_grad_(True)
        if not managers:
            for parameter in self.model.managers.parameters():
                torch.nn.init.zeros_(parameter).requires_grad_(False)
        vision = self.model.llava.model.vision_tower
        # Behind the last hidden state that is read nothing is trained.
        getattr(vision, "vision_model", vision).post_layernorm.requires_grad_(False)

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        logits, labels = self.answer_logits(batch), batch[keys.ANSWER]
        known = labels != IGNORE_INDEX
        words = torch.where(known, labels + self.words, IGNORE_INDEX)
        loss = F.cross_entropy(logits.float(), words, ignore_index=IGNORE_INDEX, reduction="sum") / known.sum().clamp(min=1)
        if split == "train":
            return StepOutput({"answer": loss})
        said = logits[:, self.words : self.words + self.answers].argmax(dim=1)
        return StepOutput(
            {"answer": loss}, outputs={keys.INDEX: batch[keys.INDEX], "answer_predicted": said, "answer_labels": labels}
        )

    def answer_logits(self, batch: dict) -> Tensor:
        """(B, words and answers and the image token) logits of the word behind each question."""
        tiles = self.tiles(batch[keys.IMAGE])
        count, side = tiles.shape[1], self.model.llava.config.vision_config.image_size
        patches = side // self.model.llava.config.vision_config.patch_size
        visual = patches**2 + (2 * patches * (2 * patches + 1) if count > 1 else 1)  # with the ends of lines
        question, mask = batch[QUESTION_IDS], batch[QUESTION_MASK]
        image = question.new_full((len(question), visual), self.model.llava.config.image_token_id)
        ids, masks = torch.cat([image, question], dim=1), torch.cat([torch.ones_like(image), mask], dim=1)
        size = torch.tensor([batch[keys.IMAGE].shape[-2:]] * len(question))
        last = visual + mask.sum(dim=1) - 1
        places = visual + torch.arange(question.shape[1], device=ids.device).minimum(mask.sum(dim=1, keepdim=True) - 1)
        logits = self.model(ids, masks, tiles, size, query=places, use_cache=False).logits
        return logits[torch.arange(len(ids), device=ids.device), last]

    def tiles(self, image: Tensor) -> Tensor:
        """(B, 5 or 1, 3, T, T) of images (B, 3, 2T, 2T): the whole image at half its size and, with ``grid``, its quarters."""
        whole = F.avg_pool2d(image, 2)[:, None]
        if not self.grid:
            return whole
        side = image.shape[-1] // 2
        quarters = image.unflatten(-1, (2, side)).unflatten(-3, (2, side)).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        return torch.cat([whole, quarters], dim=1)

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return answer_metrics(rows)

    def parameter_groups(self) -> list[dict]:
        """Managers, vision encoder, and everything else."""
        groups: dict[float, list] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                vision = self.vision_lr_scale if "vision_tower" in name else 1.0
                groups.setdefault(self.manager_lr_scale if name.startswith("managers.") else vision, []).append(parameter)
        return [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()]
