"""LLaVA-OV-Manager: conversations about images, answered by a language model whose visual tokens managers change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.base import BaseModule, StepOutput
from models import batch as keys
from models.batch import IGNORE_INDEX
from models.two_tower.batch import QUERY_PLACES, SIZES, SPANS, TILE_COUNTS, TILES, TOKEN_LABELS, TURNS
from models.two_tower.llava import ManagedLlava
from models.two_tower.llava_checkpoint import load_official


class LlavaManagerModule(BaseModule):
    """Trains a :class:`ManagedLlava` to say the answers of conversations (arXiv 2506.11515, section 4).

    The loss is the mean cross-entropy of the labelled tokens of a batch; the vocabulary is projected at those places alone.

    Args:
        model: factory ``(vocab_size, image_size, patch_size, grids, managed) -> ManagedLlava``.
        vocab_size, image_size, patch_size, grids: left null they are taken from the data.
        managers: False leaves them out: LLaVA-OneVision as it is.
        trained: ``projector``: the projector and the managers alone (stage 1); ``all``: everything (stages 1.5 and 2).
        manager_lr_scale: of the managers over the learning rate; officially 5 in stages 1.5 and 2.
        vision_lr_scale: of the vision encoder; officially 0.2.
        weights: ``(model) -> None``, loads the weights with which training starts; not called where a checkpoint is loaded.
    """

    needs = (
        keys.TOKEN_IDS, keys.TOKEN_MASK, TOKEN_LABELS, TURNS, QUERY_PLACES, TILES, TILE_COUNTS, SIZES, SPANS,
    )  # fmt: skip

    def __init__(
        self,
        model: Callable[..., ManagedLlava],
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Callable[[int], float]] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        vocab_size: int | None = None,
        image_size: int | None = None,
        patch_size: int | None = None,
        grids: Sequence[Sequence[int]] | int | None = None,
        managers: bool = True,
        trained: Literal["projector", "all"] = "all",
        manager_lr_scale: float = 1.0,
        vision_lr_scale: float = 1.0,
        weights: Callable[[ManagedLlava], None] | None = None,
    ):
        super().__init__(optimizer, scheduler, loss_weights)
        sizes = {"vocab_size": vocab_size, "image_size": image_size, "patch_size": patch_size}
        known_sizes = {name: value for name, value in sizes.items() if value is not None}
        self.model = model(**known_sizes, grids=grids, managed=managers)
        self.manager_lr_scale, self.vision_lr_scale = manager_lr_scale, vision_lr_scale
        self.weights = weights
        llava = self.model.llava.model
        if trained == "projector":
            self.model.llava.requires_grad_(False)
            llava.multi_modal_projector.requires_grad_(True)
        if not self.model.tiled:  # no line ends
            llava.image_newline.requires_grad_(False)
        # Behind the last hidden state that is read nothing is trained.
        getattr(llava.vision_tower, "vision_model", llava.vision_tower).post_layernorm.requires_grad_(False)

    def inputs(self, batch: dict) -> tuple[Any, ...]:
        """What the model takes of a batch, in its order."""
        tiles = batch[TILES].split(batch[TILE_COUNTS])
        return batch[keys.TOKEN_IDS], batch[keys.TOKEN_MASK], tiles, batch[SIZES], batch[SPANS], batch[QUERY_PLACES]

    def shared_step(self, batch: dict, split: str) -> StepOutput:
        labels = batch[TOKEN_LABELS][:, 1:]
        labelled = labels != IGNORE_INDEX
        logits = self.model.logits(self.model(*self.inputs(batch))[:, :-1][labelled])
        losses = F.cross_entropy(logits.float(), labels[labelled], reduction="none")
        loss = losses.sum() / labelled.sum().clamp(min=1)
        if split == "train":
            return StepOutput({"language": loss})
        right = logits.argmax(dim=-1) == labels[labelled]
        return StepOutput({"language": loss}, outputs=self._rows(batch, labelled, losses, right))

    def _rows(self, batch: dict, labelled: Tensor, losses: Tensor, right: Tensor) -> dict[str, Tensor]:
        """Of each conversation: answers, those of which every token would be said, their tokens, and the sum of their losses.

        The likeliest token is right at every place of an answer exactly where greedy generation says this answer.
        """
        turns = batch[TURNS][:, 1:]
        owner, turn = labelled.nonzero(as_tuple=True)[0], turns[labelled]
        of_answer = turn > 0
        shape = (len(turns), int(turns.max()) + 1)
        tokens, hits = (torch.zeros(shape, device=turns.device) for _ in range(2))
        tokens.index_put_((owner, turn), of_answer.float(), accumulate=True)
        hits.index_put_((owner, turn), (right & of_answer).float(), accumulate=True)
        sums = torch.zeros(len(turns), device=turns.device).index_put_((owner,), losses * of_answer, accumulate=True)
        answered = tokens > 0
        return {
            keys.INDEX: batch[keys.INDEX],
            "answers": answered.sum(dim=1),
            "answers_exact": (answered & (hits == tokens)).sum(dim=1),
            "answer_tokens": tokens.sum(dim=1),
            "answer_loss": sums,
        }

    def validation_metrics(self, rows: dict[str, Tensor]) -> dict[str, float]:
        return conversation_metrics(rows)

    @torch.no_grad()
    def say(self, batch: dict, end_id: int, padding_id: int, longest: int = 128) -> Tensor:
        """(1, n) ids that the model says behind one question, greedily.

        Args:
            batch: of a conversation that ends where the model answers, on the module's device.
            end_id: the token behind an answer.
            padding_id: the token at padding.
            longest: most tokens of an answer.
        """
        options: dict[str, Any] = {"eos_token_id": end_id, "pad_token_id": padding_id}
        return self.model.generate(*self.inputs(batch), max_new_tokens=longest, do_sample=False, **options)

    # ---- training ---------------------------------------------------------------------------------------------------

    def parameter_groups(self) -> list[dict]:
        """Managers, vision encoder, and everything else."""
        groups: dict[float, list] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                vision = self.vision_lr_scale if "vision_tower" in name else 1.0
                groups.setdefault(self.manager_lr_scale if name.startswith("managers.") else vision, []).append(parameter)
        return [{"params": parameters, "lr_scale": scale} for scale, parameters in groups.items()]

    def initial_weights(self) -> Callable[[], None] | None:
        return partial(self.weights, self.model) if self.weights is not None else None

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def load_official(self, weights: dict[str, Tensor]) -> None:
        load_official(self.model, weights)
        self.loaded = True


def conversation_metrics(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """Of held-out answers: the percentage that greedy generation would say exactly, the mean loss of their tokens, and its
    exponential."""
    total = max(int(rows["answers"].sum()), 1)
    loss = float(rows["answer_loss"].double().sum() / rows["answer_tokens"].double().sum().clamp(min=1))
    exact = 100 * int(rows["answers_exact"].sum()) / total
    return {"answer/exact": exact, "answer/loss": loss, "answer/perplexity": min(torch.tensor(loss).exp().item(), 1e30)}
