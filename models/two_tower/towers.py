"""The two unimodal encoders: CLIP's vision transformer and RoBERTa, which hand out the states of several layers.

Parameter names are those of the official checkpoints. Shapes: B batch, L tokens, W width of the tower.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.bert import BertEmbeddings, BertLayer


class ClipBlock(nn.Module):
    """Pre-norm block with QuickGELU: ``x += attention(ln_1(x)); x += mlp(ln_2(x))``.

    Args:
        width: W.
        heads: number of heads.
        eps: of the LayerNorms.
    """

    def __init__(self, width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = nn.Module()
        self.attn.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.attn.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.attn.out_proj = nn.Linear(width, width)
        self.mlp = nn.Module()
        self.mlp.c_fc, self.mlp.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, W) to (B, L, W)."""
        packed = F.linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        query, key, value = packed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn.out_proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        hidden = self.mlp.c_fc(self.ln_2(x))
        return x + self.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))


class ClipVision(nn.Module):
    """CLIP's vision transformer without its output projection.

    Args:
        image_size: side of an image, pixels.
        patch_size: side of a patch, pixels.
        width: W.
        layers: number of blocks.
        heads: number of heads; officially one per 64 channels.
        eps: of the LayerNorms.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int, eps: float = 1e-5):
        super().__init__()
        self.grid = image_size // patch_size
        self.conv1 = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + self.grid**2, width))
        self.ln_pre = nn.LayerNorm(width, eps=eps)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(ClipBlock(width, heads, eps) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width, eps=eps)
        self._initialise(width, layers)

    def forward(self, image: Tensor, wanted: range) -> list[Tensor]:
        """Images (B, 3, H, W) to the outputs of the ``wanted`` blocks (0-based), each normed by ``ln_post``: (B, L, W)."""
        x = self.conv1(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1) + self.positional_embedding
        x = self.ln_pre(x)
        states = []
        for i, block in enumerate(self.transformer.resblocks):
            x = block(x)
            if i in wanted:
                states.append(self.ln_post(x))
        return states

    def _initialise(self, width: int, layers: int) -> None:
        """CLIP's initial weights (arXiv 2103.00020, released code)."""
        std = width**-0.5
        for table in (self.class_embedding, self.positional_embedding):
            nn.init.normal_(table, std=std)
        for block in self.transformer.resblocks:
            nn.init.normal_(block.attn.in_proj_weight, std=std)
            nn.init.normal_(block.attn.out_proj.weight, std=std * (2 * layers) ** -0.5)
            nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.c_proj.weight, std=std * (2 * layers) ** -0.5)
            for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
                nn.init.zeros_(layer.bias)


class RobertaText(nn.Module):
    """RoBERTa without its pooler.

    Args:
        vocab_size: rows of the word table.
        max_positions: rows of the position table: two more than a text may have tokens.
        width: W.
        layers: number of layers.
        heads: number of heads.
        intermediate: hidden width of the MLPs.
        dropout: on embeddings, attention probabilities and the outputs of each sub-layer.
        eps: of the LayerNorms.
        padding_id: word id of padding, and the row of its position.
    """

    def __init__(
        self,
        vocab_size: int,
        max_positions: int,
        width: int,
        layers: int,
        heads: int,
        intermediate: int,
        dropout: float,
        eps: float = 1e-5,
        padding_id: int = 1,
    ):
        super().__init__()
        self.padding_id = padding_id
        self.embeddings = BertEmbeddings(vocab_size, max_positions, width, dropout, eps, padding_id, token_types=1)
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(
            BertLayer(width, heads, intermediate, dropout, cross=False, eps=eps) for _ in range(layers)
        )

    def forward(self, ids: Tensor, mask: Tensor, wanted: range) -> list[Tensor]:
        """Token ids and mask (B, L) to the outputs of the ``wanted`` layers (0-based): (B, L, W)."""
        real = ids != self.padding_id
        x = self.embeddings(ids, real.cumsum(dim=1) * real + self.padding_id)
        states = []
        for i, layer in enumerate(self.encoder.layer):
            x = layer(x, mask)
            if i in wanted:
                states.append(x)
        return states
