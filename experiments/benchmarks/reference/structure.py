"""STRUCTURE written down as its definitions: every power anew, whole matrices, full sorts, decompositions of the data."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def structure_loss(
    original: Tensor,
    aligned: Tensor,
    levels: int = 3,
    temperature: float = 0.1,
    weighting: str = "inverse",
    divergence: str = "js",
    margin: float = 0.0,
) -> Tensor:
    """The regulariser with torch's own gradients, in the official order of operations."""

    def similarity(x: Tensor) -> Tensor:
        z = F.normalize(x, dim=-1)
        z = z - z.mean(dim=0)
        return z @ z.T / temperature

    of_original, of_aligned = similarity(original), similarity(aligned)
    total = original.new_zeros(())
    for level in range(1, levels + 1):
        p = torch.linalg.matrix_power(of_original.softmax(dim=1), level)
        q = torch.linalg.matrix_power(of_aligned.softmax(dim=1), level)
        middle = (p + q) / 2 + 1e-12
        if divergence == "reversed":
            of_q = F.kl_div((q + 1e-12).log(), middle, reduction="batchmean")
            of_p = F.kl_div((p + 1e-12).log(), middle, reduction="batchmean")
        else:
            of_q = F.kl_div(middle.log(), q, reduction="batchmean")
            of_p = F.kl_div(middle.log(), p, reduction="batchmean")
        here = torch.relu((of_p + of_q) / 2 - margin)
        total = total + here * (1 / level if weighting == "inverse" else 1.0)
    return total / levels


def mutual_knn_scores(vision: Tensor, text: Tensor) -> Tensor:
    """Scores of all pairs of layers (n, layers, D), with a full sort of both sides for each pair."""
    n = len(vision)
    k = math.ceil(2 * n ** (1 / 3))

    def neighbours(x: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1)
        scores = x @ x.T
        scores.fill_diagonal_(-1e8)
        return scores.argsort(dim=1, descending=True)[:, :k]

    out = torch.empty(vision.shape[1], text.shape[1])
    for i in range(vision.shape[1]):
        for j in range(text.shape[1]):
            a, b = torch.zeros(n, n), torch.zeros(n, n)
            a.scatter_(1, neighbours(vision[:, i]), 1)
            b.scatter_(1, neighbours(text[:, j]), 1)
            out[i, j] = (a * b).sum(dim=1).mean() / k
    return out


def csa_correlations(image: Tensor, text: Tensor, dim: int) -> Tensor:
    """Canonical correlations from thin singular value decompositions of the centred data."""
    bases = [torch.linalg.svd((x - x.mean(dim=0)).double(), full_matrices=False).U for x in (image, text)]
    return torch.linalg.svdvals(bases[0].T @ bases[1])[:dim].float()


def kernel_cka(x: Tensor, y: Tensor, unbiased: bool) -> float:
    """CKA from whole kernel matrices."""
    n = len(x)
    k, l = x @ x.T, y @ y.T  # noqa: E741

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        if not unbiased:
            h = torch.eye(n, dtype=a.dtype) - 1 / n
            return torch.trace(a @ h @ b @ h)
        a, b = a - torch.diag(a.diagonal()), b - torch.diag(b.diagonal())
        value = (a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * (a @ b).sum() / (n - 2)
        return value / (n * (n - 3))

    return (hsic(k, l) / ((hsic(k, k) * hsic(l, l)).sqrt() + 1e-6)).item()


def cknna(x: Tensor, y: Tensor, k: int) -> float:
    """CKNNA from whole matrices (unbiased HSIC of kernels masked to mutual neighbours)."""
    n = len(x)
    kernels, masks = [], []
    for z in (x, y):
        kernel = z @ z.T
        ranked = kernel.clone().fill_diagonal_(-torch.inf)
        masks.append(torch.zeros(n, n, dtype=z.dtype).scatter_(1, ranked.topk(k, dim=1).indices, 1))
        kernels.append(kernel)

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - torch.diag(a.diagonal()), b - torch.diag(b.diagonal())
        value = (a * b.T).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 * (a @ b).sum() / (n - 2)
        return value / (n * (n - 3))

    both = masks[0] * masks[1]
    cross = hsic(both * kernels[0], both * kernels[1])
    own = [hsic(m * z, m * z) for m, z in zip(masks, kernels, strict=True)]
    return (cross / ((own[0] * own[1]).sqrt() + 1e-6)).item()


def trustworthiness(x: Tensor, z: Tensor, k: int) -> float:
    """By full sorts."""
    n = len(x)
    order_x = torch.cdist(x, x).fill_diagonal_(-1).argsort(dim=1)
    order_z = torch.cdist(z, z).fill_diagonal_(-1).argsort(dim=1)
    total = 0
    for i in range(n):
        rank = {int(j): r for r, j in enumerate(order_x[i])}
        total += sum(max(rank[int(j)] - k, 0) for j in order_z[i, 1 : k + 1])
    return 1 - 2 * total / (n * k * (2 * n - 3 * k - 1))
