"""The knowledge graph: entity vectors, graph attention over them, and the prediction of entities from an image or a text.

Parameter names are those of the official checkpoints. Shapes: B batch, M entities of a text, E entities of the graph, T
triples, K width of an entity, H heads, C channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NO_ENTITY = -100  # id of an empty place in a list of entities
PREDICTORS = ("img_linear1", "img_linear2", "txt_linear1", "txt_linear2")  # heads of the task ``align``
_TINY = 1e-16  # added to the denominator of the attention


class Graph:
    """A knowledge graph in numbers.

    Args:
        names: of the E entities.
        triples: (T, 2) int64 head and tail of each triple.
        vectors: (E, K) initial entity vectors; None: random ones.
    """

    def __init__(self, names: Sequence[str], triples: Tensor, vectors: Tensor | None = None):
        self.names, self.triples, self.vectors = names, triples, vectors


class GraphAttention(nn.Module):
    """Graph attention (GAT, arXiv 1710.10903) on an edge list, a repeated edge counting repeatedly.

    Every node has one edge to itself, whether the list holds such edges or not.

    Args:
        width: of the input.
        channels: C.
        heads: H.
        concat: whether heads are concatenated, else averaged.
        dropout: on attention weights.
        slope: of LeakyReLU below 0.
    """

    def __init__(self, width: int, channels: int, heads: int, concat: bool, dropout: float = 0.2, slope: float = 0.2):
        super().__init__()
        self.heads, self.concat, self.dropout, self.slope = heads, concat, dropout, slope
        self.lin = nn.Linear(width, heads * channels, bias=False)
        self.att_src = nn.Parameter(torch.empty(1, heads, channels))
        self.att_dst = nn.Parameter(torch.empty(1, heads, channels))
        self.bias = nn.Parameter(torch.zeros(heads * channels if concat else channels))
        for weight in (self.lin.weight, self.att_src, self.att_dst):
            bound = math.sqrt(6 / (weight.shape[-2] + weight.shape[-1]))
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        """Nodes (E, width) to (E, H * C), or (E, C) if heads are averaged.

        Args:
            x: (E, width).
            edges: (2, T) int64, source and target of each edge: a node reads the sources of the edges that end in it.
        """
        values = self.lin(x).unflatten(-1, (self.heads, -1))
        of_source, of_target = ((values * vector).sum(dim=-1).float() for vector in (self.att_src, self.att_dst))
        loops = torch.arange(len(x), device=x.device)
        source, target = torch.cat([edges, torch.stack([loops, loops])], dim=1)
        scores = F.leaky_relu(of_source[source] + of_target[target], self.slope)
        # Edges of the list from a node to itself weigh nothing: selecting the others would wait for the device.
        listed = edges[0] == edges[1]
        scores = scores.masked_fill(F.pad(listed, (0, len(loops)))[:, None], -torch.inf)
        largest = torch.full_like(of_target, -torch.inf)
        largest = largest.scatter_reduce(0, target[:, None].expand_as(scores), scores.detach(), "amax")
        weights = (scores - largest[target]).exp()
        total = torch.zeros_like(of_target).index_add(0, target, weights)
        weights = F.dropout(weights / (total[target] + _TINY), self.dropout, self.training).to(values.dtype)
        out = torch.zeros_like(values).index_add(0, target, values[source] * weights[..., None])
        return (out.flatten(1) if self.concat else out.mean(dim=1)) + self.bias


class KnowledgeGraph(nn.Module):
    """Entity vectors, their encoding along the triples, and the heads that predict entities (``align_head``).

    Relations are not told apart. The vectors and triples come from :meth:`set_graph` or a checkpoint.

    Args:
        entities: E.
        triples: T.
        width: K.
        feature_width: of the features that entities are predicted from.
        channels: of a head of the first graph attention.
        heads: of the first graph attention; the second has one.
        dropout: before each graph attention and on its weights.
        predicts: whether there are the heads of :meth:`predict`.
    """

    def __init__(
        self,
        entities: int,
        triples: int,
        width: int = 256,
        feature_width: int = 768,
        channels: int = 64,
        heads: int = 8,
        dropout: float = 0.2,
        predicts: bool = True,
    ):
        super().__init__()
        self.x = nn.Parameter(F.normalize(torch.randn(entities, width), dim=-1))
        self.register_buffer("edge_index", torch.zeros(2, triples, dtype=torch.int64))
        self.embedding_ln = nn.LayerNorm(width)
        self.conv1 = GraphAttention(width, channels, heads, concat=True, dropout=dropout)
        self.conv2 = GraphAttention(heads * channels, width, 1, concat=False, dropout=dropout)
        self.dropout = dropout
        for name in PREDICTORS if predicts else ():
            self.add_module(name, nn.Linear(feature_width, feature_width if name.endswith("1") else width))

    @torch.no_grad()
    def set_graph(self, triples: Tensor, vectors: Tensor | None = None) -> None:
        """Take the graph over.

        Args:
            triples: (T, 2) int64 head and tail of each triple.
            vectors: (E, K) initial entity vectors; None leaves those that there are.
        """
        if triples.shape != self.edge_index.T.shape or (vectors is not None and vectors.shape != self.x.shape):
            shapes = f"{tuple(triples.shape)} and {None if vectors is None else tuple(vectors.shape)}"
            raise ValueError(f"triples and vectors {shapes} for {self.edge_index.shape[1]} triples and {tuple(self.x.shape)}")
        self.edge_index.copy_(triples.T)
        if vectors is not None:
            self.x.copy_(vectors)

    def forward(self) -> Tensor:
        """(E, K) entities after two rounds of graph attention."""
        x = F.dropout(self.embedding_ln(self.x), self.dropout, self.training)
        x = F.dropout(F.elu(self.conv1(x, self.edge_index)), self.dropout, self.training)
        return self.conv2(x, self.edge_index)

    def predict(self, side: str, feature: Tensor, encoded: Tensor) -> Tensor:
        """(B, E) logits of the entities of an image (``img``) or a text (``txt``).

        Args:
            side: whose feature.
            feature: (B, feature_width).
            encoded: (E, K) from :meth:`forward`.
        """
        first, second = getattr(self, f"{side}_linear1"), getattr(self, f"{side}_linear2")
        return F.relu(second(F.relu(first(feature)))) @ encoded.T


def pick(table: Tensor, ids: Tensor) -> Tensor:
    """Rows (B, M, K) of ``table`` (E, K); zeros where ``ids`` (B, M) is NO_ENTITY."""
    absent = ids == NO_ENTITY
    return table[ids.masked_fill(absent, 0)].masked_fill(absent[..., None], 0)


def entity_labels(ids: Tensor, count: int) -> Tensor:
    """(B, ``count``) float32, 1 at the entities that ``ids`` (B, n) lists; NO_ENTITY is none."""
    labels = torch.zeros(len(ids), count + 1, device=ids.device)
    return labels.scatter_(1, ids.masked_fill(ids == NO_ENTITY, count), 1.0)[:, :count]


def entity_auroc(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) share of the pairs of a named and another entity in which the named one has the larger logit; -1 without a pair.

    Args:
        logits: (B, E).
        labels: (B, E), 1 at named entities.
    """
    ranks = logits.float().argsort(dim=1).argsort(dim=1)
    named = labels.sum(dim=1)
    above = (ranks * labels).sum(dim=1) - named * (named - 1) / 2
    pairs = named * (labels.shape[1] - named)
    return torch.where(pairs > 0, above / pairs.clamp(min=1), -1.0)
