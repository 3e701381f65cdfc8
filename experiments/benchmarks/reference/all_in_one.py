"""All-in-One in the plain, official order of operations: what the benchmarks and tests compare the fast paths with.

Written from the description of the official forward pass: text repeated for every frame, a loop over frames with resize,
mask and permutation, the roll by whole-tensor copies, explicit attention weights, all tokens in every block, and the
decoder on every position. It runs on the parameters of our model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.all_in_one.model import AllInOne


def roll(x: Tensor, frames: int, divisor: int = 8) -> Tensor:
    """(B*T, L, D): zeros, two rolls, three copies."""
    clips = x.view(-1, frames, *x.shape[1:])
    fold = x.shape[1] // divisor
    out = torch.zeros_like(clips)
    out[:, :, 1 : fold + 1] = torch.roll(clips, 1, dims=1)[:, :, 1 : fold + 1]
    out[:, :, -fold:] = torch.roll(clips, -1, dims=1)[:, :, -fold:]
    out[:, :, fold + 1 : -fold] = clips[:, :, fold + 1 : -fold]
    out[:, :, 0] = clips[:, :, 0]
    return out.view_as(x)


def visual_embed(model: AllInOne, video: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B*T, 1 + P, D) and mask, frame by frame."""
    visual = model.transformer
    clips, frames = video.shape[:2]
    flat = video.flatten(0, 1)
    patches = visual.patch_embed.proj(flat)
    height, width = patches.shape[2:]
    mask = F.interpolate((flat.sum(dim=1) != 0).float()[:, None], size=(height, width)).long()
    rows, columns = mask[:, 0].sum(dim=1)[:, 0], mask[:, 0].sum(dim=2)[:, 0]
    side = visual.side
    table = visual.pos_embed[:, 1:].transpose(1, 2).view(1, -1, side, side)
    positions = torch.cat(
        [
            F.pad(
                F.interpolate(table, size=(h, w), mode="bilinear", align_corners=True),
                (0, width - w, 0, height - h),
            )
            for h, w in zip(rows.tolist(), columns.tolist(), strict=True)
        ]
    )
    patches, positions = patches.flatten(2).transpose(1, 2), positions.flatten(2).transpose(1, 2)
    mask = mask.flatten(1)
    chosen_patches, chosen_positions, chosen_mask = [], [], []
    for i in range(len(patches)):
        valid = torch.nonzero(mask[i]).flatten()
        index = valid[order[i]]
        chosen_patches.append(patches[i, index])
        chosen_positions.append(positions[i, index])
        chosen_mask.append(mask[i, index])
    x, positions, mask = torch.stack(chosen_patches), torch.stack(chosen_positions), torch.stack(chosen_mask)
    time = visual.temporal_embed[:, :frames].repeat(clips, 1, 1).view(clips * frames, 1, -1)
    x = torch.cat([visual.cls_token.expand(len(x), -1, -1), x], dim=1)
    positions = torch.cat([visual.pos_embed[:, :1].expand(len(x), -1, -1), positions + time], dim=1)
    return x + positions, torch.cat([torch.ones_like(mask[:, :1]), mask], dim=1)


def attention(module: Any, x: Tensor, mask: Tensor) -> Tensor:
    heads, width = module.num_heads, x.shape[-1]
    q, k, v = module.qkv(x).view(*x.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1)) * (width // heads) ** -0.5
    weights = weights.masked_fill(~mask.bool()[:, None, None], float("-inf")).softmax(dim=-1)
    return module.proj((weights @ v).transpose(1, 2).reshape(x.shape))


def blocks(model: AllInOne, x: Tensor, mask: Tensor) -> Tensor:
    for block in model.transformer.blocks:
        x = _block(block, x, mask)
    return model.transformer.norm(x)


def _block(block: Any, x: Tensor, mask: Tensor) -> Tensor:
    x = x + attention(block.attn, block.norm1(x), mask)
    return x + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(x))))


def encode_pair(model: AllInOne, ids: Tensor, text_mask: Tensor, video: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """text (B, L, D), visual (B, P + 1, D) and pooled (B, D) of a text with a clip; evaluation mode, no dropout."""
    frames, length = video.shape[1], ids.shape[1]
    text = model.text_embeddings(ids).repeat_interleave(frames, dim=0)
    visual, visual_mask = visual_embed(model, video, order)
    text = text + model.token_type_embeddings(torch.zeros(text.shape[:2], dtype=torch.long))
    visual = visual + model.token_type_embeddings(torch.ones_like(visual_mask))
    x = torch.cat([text, visual], dim=1)
    mask = torch.cat([text_mask.repeat_interleave(frames, dim=0), visual_mask], dim=1)
    for block in model.transformer.blocks:
        x = torch.cat([x[:, :length], roll(x[:, length:], frames)], dim=1)
        x = _block(block, x, mask)
    x = model.transformer.norm(x).view(len(ids), frames, *x.shape[1:]).mean(dim=1)
    return x[:, :length], x[:, length:], torch.tanh(model.pooler.dense(x[:, 0]))


def encode_text(model: AllInOne, ids: Tensor, mask: Tensor, frames: int) -> Tensor:
    """token 0 (B, D): one equal copy per frame, averaged."""
    x = model.text_embeddings(ids).repeat_interleave(frames, dim=0)
    x = x + model.token_type_embeddings(torch.zeros(x.shape[:2], dtype=torch.long))
    x = blocks(model, x, mask.repeat_interleave(frames, dim=0))
    return x.view(len(ids), frames, *x.shape[1:]).mean(dim=1)[:, 0]


def transport(text: Tensor, visual: Tensor, text_valid: Tensor, visual_valid: Tensor) -> Tensor:
    """Distances (B,) by 50 iterations of IPOT, one sample at a time, without padding."""
    distances = []
    for x, y, x_real, y_real in zip(text, visual, text_valid, visual_valid, strict=True):
        x, y = x[x_real], y[y_real]
        cost = 1 - F.normalize(x, dim=-1, eps=1e-5) @ F.normalize(y, dim=-1, eps=1e-5).T
        with torch.no_grad():
            kernel, plan = torch.exp(-cost.T / 0.5), torch.ones_like(cost.T)
            sigma = torch.full((len(x), 1), 1 / len(x))
            for _ in range(50):
                q = kernel * plan
                delta = 1 / (len(y) * (q @ sigma))
                sigma = 1 / (len(x) * (delta.T @ q).T)
                plan = delta * q * sigma.T
        distances.append((cost * plan.T).sum())
    return torch.stack(distances)


def pretraining_loss(model: AllInOne, batch: dict[str, Tensor], order_mlm: Tensor, order_vtm: Tensor) -> Tensor:
    """MLM + VTM + word-patch alignment, two whole forward passes, false clips for the zeros of ``matched``."""
    ids, mask, matched = batch["ids"], batch["mask"], batch["matched"]
    text, _, _ = encode_pair(model, batch["masked_ids"], mask, batch["video"], order_mlm)
    logits = model.mlm_score(text)
    mlm = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    video = torch.stack([batch["video"][i] if matched[i] else batch["false_video"][i] for i in range(len(ids))])
    text, visual, pooled = encode_pair(model, ids, mask, video, order_vtm)
    vtm = F.cross_entropy(model.itm_score.fc(pooled), matched)
    text_valid = mask.bool().clone()
    text_valid[:, 0] = False
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        text_valid[row, length - 1] = False
    visual_valid = torch.ones(visual.shape[:2], dtype=torch.bool)
    visual_valid[:, 0] = False
    distance = transport(text, visual, text_valid, visual_valid)
    align = 0.1 * (distance[matched == 1].sum() - distance[matched == 0].sum()) / len(ids)
    return mlm + vtm + align
