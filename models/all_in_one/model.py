"""All-in-One (arXiv 2203.07303): one ViT for text, video, and both, with token rolling between frames.

Parameter names are those of the official checkpoints, so that weights go both ways without translation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.all_in_one.blocks import Block
from models.all_in_one.rolling import roll_tokens
from models.all_in_one.visual import Patches, PatchOrder, Tokens, VisualEmbedding
from models.layers.bert import BertEmbeddings, MLMHead
from models.layers.heads import mlp_head

Head = Literal["match", "mlm", "contrastive", "rank", "rank_reason", "answer", "option"]
Mixing = Literal["roll", "none", "joint"]


class Encoded(NamedTuple):
    """What the backbone says about B clips, texts or pairs, averaged over frames and normed.

    ``text`` (B, Lt, D) and ``visual`` (B, Lv, D), None where absent or not asked for; ``first`` (B, D): token 0, the text's
    [CLS] wherever there is text; ``pooled`` (B, D): tanh(dense(first)); masks (B, L) bool, None where all are real.
    ``visual[:, j]`` averages the patches at place j, different ones in each frame unless the order is the raster.
    """

    text: Tensor | None
    visual: Tensor | None
    first: Tensor
    pooled: Tensor
    text_mask: Tensor | None = None
    visual_mask: Tensor | None = None


class AllInOne(nn.Module):
    """The unified backbone and the heads of its tasks.

    Args:
        width: of the tokens (Ti 192, S 384, B 768).
        depth: number of blocks.
        heads: number of heads (Ti 3, S 6, B 12).
        mlp_ratio: hidden width of the MLPs over ``width``.
        patch_size: side of a patch, pixels.
        image_size: side of a frame, pixels; position vectors of other grids are interpolated.
        vocab_size: rows of the word table.
        text_length: rows of the position table.
        frames: rows of the temporal embedding, the most frames a clip may have.
        distilled: DeiT's distilled class (S): a second leading token, no temporal vectors.
        tasks: which heads to build: ``match`` (video-text matching), ``mlm``, ``contrastive`` (projections of the dual
            encoder), ``rank`` (retrieval and multiple choice by matching), ``rank_reason`` (VCR's second step), ``answer``
            (open-ended questions and actions), ``option`` (multiple choice with its own classifier).
        num_answers: classes of the head ``answer``.
        embed_dim: of the contrastive space.
        drop_rate: dropout.
        drop_path_rate: stochastic depth, rising linearly to this rate in the last block.
        answer_drop_rate: dropout in front of the classifier of ``answer``.
        roll_divisor: 1 / this share of the visual tokens rolls in each direction.
        mixing: ``roll`` is the paper's; ``none`` leaves the frames apart (same cost); ``joint`` attends over the tokens of
            all frames at once, in one sequence.
        time_vectors: whether the temporal embedding is added and trained; the official code switched it off and on again.
        train_order, eval_order: order of the patches, see ``VisualEmbedding.draw_order``. The official code draws at random
            in evaluation as well, which makes its scores change from run to run.
        order_seed: of ``seeded``.
        init_std: of the initial weights; the official 0.02 suits wide models, narrow ones hardly learn from it.
    """

    def __init__(
        self,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        image_size: int = 224,
        vocab_size: int = 30522,
        text_length: int = 40,
        frames: int = 3,
        distilled: bool = False,
        tasks: Sequence[Head] = ("match", "mlm"),
        num_answers: int | None = None,
        embed_dim: int = 512,
        drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
        answer_drop_rate: float = 0.5,
        roll_divisor: int = 8,
        mixing: Mixing = "roll",
        time_vectors: bool = True,
        train_order: PatchOrder = "random",
        eval_order: PatchOrder = "seeded",
        order_seed: int = 0,
        init_std: float = 0.02,
    ):
        super().__init__()
        self.width, self.mixing, self.roll_divisor = width, mixing, roll_divisor
        self.train_order, self.eval_order, self.order_seed = train_order, eval_order, order_seed
        self.tasks = tuple(tasks)
        self.text_embeddings = BertEmbeddings(vocab_size, text_length, width, drop_rate)
        self.token_type_embeddings = nn.Embedding(2, width)
        self.transformer = VisualEmbedding(width, patch_size, image_size, frames, distilled, time_vectors, drop_rate)
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.transformer.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, drop_rate, rate) for rate in rates)
        self.transformer.norm = nn.LayerNorm(width, eps=1e-6)
        self.pooler = nn.Module()
        self.pooler.dense = nn.Linear(width, width)
        self._build_heads(vocab_size, num_answers, embed_dim, answer_drop_rate)
        self._initialise(init_std)

    # ---- encoding -----------------------------------------------------------------------------------------------

    def encode_pair(
        self,
        ids: Tensor,
        mask: Tensor,
        patches: Patches,
        order: Tensor | None = None,
        read: Literal["all", "text", "first"] = "all",
    ) -> Encoded:
        """Text and video together, the only way of encoding in which tokens roll.

        Args:
            ids, mask: (B, Lt) word pieces, or (B, C, Lt): C candidates for each clip, whose patches are embedded once.
            patches: of B clips, from :meth:`embed`.
            order: (B*C*T, L) patch orders, rows over (clip, candidate, frame); None: drawn by train_order or eval_order, one
                order per clip for all its candidates.
            read: which outputs are read: with ``text`` or ``first`` the last block computes only those tokens.

        Returns Encoded with B*C rows, the candidate fastest.
        """
        candidates = ids.shape[1] if ids.dim() == 3 else 1
        ids, mask = ids.flatten(0, -2), mask.flatten(0, -2)
        frames, length = patches.tokens.shape[1], ids.shape[1]
        if order is None:
            order = self._draw(patches)
        visual = self.transformer.arrange(patches, order)
        if len(visual.tokens) < len(ids) * frames:  # one order for all candidates of a clip
            visual = Tokens(*(_per_candidate(part, frames, candidates) for part in visual))
        text = self.text_embeddings(ids) + self.token_type_embeddings.weight[0]
        video = (visual.tokens + self.token_type_embeddings.weight[1]).unflatten(0, (-1, frames))
        video_mask = None if visual.mask is None else visual.mask.unflatten(0, (-1, frames))
        rows = {"all": None, "text": length, "first": 1}[read]
        x, pooled_video = self._encode(text, mask.bool(), video, video_mask, rows)
        first = x[:, 0]
        pooled = torch.tanh(self.pooler.dense(first))
        real = None if video_mask is None else video_mask[:, 0]
        return Encoded(x[:, :length] if read != "first" else None, pooled_video, first, pooled, mask.bool(), real)

    def encode_text(self, ids: Tensor, mask: Tensor, read: Literal["all", "first"] = "all") -> Encoded:
        """Text alone (B, Lt): once, where the official code encodes one equal copy per frame and averages."""
        x = self.text_embeddings(ids) + self.token_type_embeddings.weight[0]
        keys = None if bool(mask.all()) else mask.bool()[:, None]
        x = self.run_blocks(x[:, None], keys, None if read == "all" else 1)
        return Encoded(x if read == "all" else None, None, x[:, 0], torch.tanh(self.pooler.dense(x[:, 0])), mask.bool())

    def encode_video(self, patches: Patches, order: Tensor | None = None, read: Literal["all", "first"] = "all") -> Encoded:
        """Video alone: every frame by itself, averaged; nothing rolls, so that the order only arranges ``visual``."""
        frames = patches.tokens.shape[1]
        if order is None and patches.grids is not None:
            order = self._draw(patches)
        visual = self.transformer.arrange(patches, order)
        tokens = (visual.tokens + self.token_type_embeddings.weight[1]).unflatten(0, (-1, frames))
        mask = None if visual.mask is None else visual.mask.unflatten(0, (-1, frames))
        rows = None if read == "all" else 1
        if self.mixing == "joint":
            x = self.run_blocks(tokens.flatten(1, 2)[:, None], None if mask is None else mask.flatten(1)[:, None], rows)
            x = x.unflatten(1, (frames, -1)).mean(dim=1) if rows is None else x
        else:
            x = self.run_blocks(tokens, mask, rows)
        real = None if mask is None else mask[:, 0]
        return Encoded(None, x if read == "all" else None, x[:, 0], torch.tanh(self.pooler.dense(x[:, 0])), None, real)

    def embed(self, video: Tensor, grids: Tensor | None = None, still: bool = False) -> Patches:
        """Patches of (B, T, 3, H, W), to be used by any number of encodings."""
        return self.transformer.patches(video, grids, still)

    def _draw(self, patches: Patches) -> Tensor | None:
        how = self.train_order if self.training else self.eval_order
        return self.transformer.draw_order(patches, how, self.order_seed)

    def _encode(
        self, text: Tensor, text_mask: Tensor, video: Tensor, video_mask: Tensor | None, rows: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """text (B, Lt, D) and video (B, T, Lv, D) to the text's rows (B, rows or Lt, D) and the visual ones (B, Lv, D)."""
        frames, length = video.shape[1], text.shape[1]
        if video_mask is None and not bool(text_mask.all()):
            video_mask = torch.ones(video.shape[:3], dtype=torch.bool, device=video.device)
        if self.mixing == "joint":
            mask = None if video_mask is None else torch.cat([text_mask, video_mask.flatten(1)], dim=1)[:, None]
            x = self.run_blocks(torch.cat([text, video.flatten(1, 2)], dim=1)[:, None], mask, rows)
            visual = x[:, length:].unflatten(1, (frames, -1)).mean(dim=1) if rows is None else None
            return x[:, :length], visual
        x = torch.cat([text[:, None].expand(-1, frames, -1, -1), video], dim=2)
        mask = None
        if video_mask is not None:
            mask = torch.cat([text_mask[:, None].expand(-1, frames, -1), video_mask], dim=2)
        x = self.run_blocks(x, mask, rows, length if self.mixing == "roll" else None)
        return x[:, :length], x[:, length:] if rows is None else None

    def run_blocks(self, x: Tensor, mask: Tensor | None, rows: int | None = None, roll_from: int | None = None) -> Tensor:
        """Sequences (B, F, L, D) of F frames through all blocks, normed and averaged over the frames: (B, L, D).

        Args:
            x: (B, F, L, D).
            mask: (B, F, L) bool, True at keys that count; None: all do.
            rows: leading tokens that the last block computes; None: all.
            roll_from: the first token that takes part in rolling between frames; None: nothing rolls.
        """
        frames, last = x.shape[1], len(self.transformer.blocks) - 1
        x = x.flatten(0, 1)
        mask = None if mask is None else mask.flatten(0, 1)[:, None, None]
        for i, block in enumerate(self.transformer.blocks):
            x = x if roll_from is None else roll_tokens(x, frames, self.roll_divisor, roll_from)
            x = block(x, mask, rows if i == last else None)
        return self.transformer.norm(x).unflatten(0, (-1, frames)).mean(dim=1)

    # ---- heads --------------------------------------------------------------------------------------------------

    def similarity_embeddings(self, encoded: Encoded, of: Literal["text", "video"]) -> Tensor:
        """(B, embed_dim) projection of token 0 for the dual encoder; not normalised."""
        return (self.txt_proj if of == "text" else self.vid_proj)(encoded.first)

    def rank_like_match(self) -> None:
        """Set the ranking heads to the matching head's row for "match": the start of fine-tuning, and zero-shot choice."""
        with torch.no_grad():
            for name in ("rank_output", "rank_output_2"):
                if hasattr(self, name):
                    getattr(self, name).weight.copy_(self.itm_score.fc.weight[1:])
                    getattr(self, name).bias.copy_(self.itm_score.fc.bias[1:])

    def _build_heads(self, vocab_size: int, num_answers: int | None, embed_dim: int, answer_drop_rate: float) -> None:
        width = self.width
        if {"match", "rank", "rank_reason"} & set(self.tasks):
            self.itm_score = nn.Module()
            self.itm_score.fc = nn.Linear(width, 2)
        if "mlm" in self.tasks:
            self.mlm_score = MLMHead(width, vocab_size)
        if "contrastive" in self.tasks:
            self.txt_proj, self.vid_proj = nn.Linear(width, embed_dim), nn.Linear(width, embed_dim)
        if "rank" in self.tasks:
            self.rank_output = nn.Linear(width, 1)
        if "rank_reason" in self.tasks:
            self.rank_output_2 = nn.Linear(width, 1)
        if "answer" in self.tasks:
            if num_answers is None:
                raise ValueError("the head 'answer' needs the number of answers")
            self.vqa_classifier = _classifier(width, width // 2, num_answers, answer_drop_rate)
        if "option" in self.tasks:
            self.mc_vqa_classifier = _classifier(width, 256, 1, 0.1)

    def _initialise(self, std: float) -> None:
        visual = self.transformer
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.startswith("transformer."):
                    nn.init.trunc_normal_(module.weight, std=std)
                else:
                    nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                # The padding row becomes random too (official), and keeps its zero gradient.
                nn.init.normal_(module.weight, std=std)
        for table in (visual.pos_embed, visual.cls_token, *([visual.dist_token] if visual.distilled else [])):
            nn.init.trunc_normal_(table, std=std)
        if hasattr(self, "itm_score"):
            self.rank_like_match()


def _classifier(width: int, hidden: int, out: int, drop_rate: float) -> nn.Sequential:
    """Modules 1, 2 and 4 hold the parameters, as in the official files."""
    return nn.Sequential(nn.Dropout(drop_rate), *mlp_head(width, hidden, out=out))


def _per_candidate(part: Tensor | None, frames: int, candidates: int) -> Tensor | None:
    """(B*T, ...) to (B*C*T, ...), each clip's frames once for every candidate."""
    if part is None:
        return None
    return part.unflatten(0, (-1, frames)).repeat_interleave(candidates, dim=0).flatten(0, 1)
