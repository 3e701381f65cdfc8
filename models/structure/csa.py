"""CSA, canonical similarity analysis: alignment by canonical correlations in closed form (arXiv 2410.07610; a base
method of STRUCTURE, arXiv 2506.16895), optionally refined with STRUCTURE's regulariser.

Everything comes from D x D covariances that are accumulated in one pass over the features.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from models.errors import UserError


class Covariances(NamedTuple):
    """Of paired features: sample count, means (Dx,), (Dt,) and centred sums of products (Dx, Dx), (Dt, Dt), (Dx, Dt)."""

    num_pairs: int
    mean_image: Tensor
    mean_text: Tensor
    image: Tensor
    text: Tensor
    cross: Tensor


class CSAMaps(NamedTuple):
    """Centre by ``mean_*`` (D,), project by ``*_map`` (D, k); ``correlations`` (k,) are the canonical ones."""

    mean_image: Tensor
    mean_text: Tensor
    image_map: Tensor
    text_map: Tensor
    correlations: Tensor

    def image(self, features: Tensor) -> Tensor:
        """Features (n, Dx) to embeddings (n, k), not normalised."""
        return (features - self.mean_image) @ self.image_map

    def text(self, features: Tensor) -> Tensor:
        """Features (n, Dt) to embeddings (n, k), not normalised."""
        return (features - self.mean_text) @ self.text_map


def covariances(chunks: Iterable[tuple[Tensor, Tensor]]) -> Covariances:
    """One pass over pairs of image (n, Dx) and text (n, Dt) features, in float64."""
    count, totals, products = 0, None, None
    for image, text in chunks:
        image, text = image.double(), text.double()
        if totals is None:
            # Shifted by the first chunk's mean: sums of squares then lose no digits to a large common mean.
            shift = image.mean(dim=0), text.mean(dim=0)
            totals = [torch.zeros_like(s) for s in shift]
            products = [image.new_zeros(a.numel(), b.numel()) for a, b in ((shift[0],) * 2, (shift[1],) * 2, shift)]
        image, text = image - shift[0], text - shift[1]
        count += len(image)
        totals[0] += image.sum(dim=0)
        totals[1] += text.sum(dim=0)
        for product, (a, b) in zip(products, ((image, image), (text, text), (image, text)), strict=True):
            product.addmm_(a.T, b)
    if count < 2:
        raise UserError(f"CSA needs at least 2 pairs, got {count}.")
    means = [total / count for total in totals]
    for product, (i, j) in zip(products, ((0, 0), (1, 1), (0, 1)), strict=True):
        product.addr_(means[i], means[j], alpha=-count)
    return Covariances(count, means[0] + shift[0], means[1] + shift[1], *products)


def csa(statistics: Covariances, dim: int = 512, tolerance: float = 1e-6) -> CSAMaps:
    """The ``dim`` pairs of directions with the highest correlations.

    Args:
        tolerance: directions whose singular value is below this share of the largest are left out. The official code
            keeps them, so that with fewer pairs than dimensions a direction without variance dominates; the result is the same
            where there is none.

    Raises UserError where fewer than ``dim`` directions remain.
    """
    white_image, white_text = _whitening(statistics.image, tolerance), _whitening(statistics.text, tolerance)
    rank = min(white_image.shape[1], white_text.shape[1])
    if dim > rank:
        raise UserError(
            f"CSA to {dim} dimensions, but only {rank} directions of these {statistics.num_pairs} pairs vary on both sides. "
            f"Lower module.embed_dim to at most {rank}, or use more pairs."
        )
    left, correlations, right = torch.linalg.svd(white_image.T @ statistics.cross @ white_text, full_matrices=False)
    scale = statistics.num_pairs**0.5
    image_map = scale * white_image @ left[:, :dim]
    # The factor N / (N - 1) is that of the library the official code uses; it cancels when rows are normalised.
    text_map = scale * statistics.num_pairs / (statistics.num_pairs - 1) * white_text @ right[:dim].T
    maps = (statistics.mean_image, statistics.mean_text, image_map, text_map, correlations[:dim])
    return CSAMaps(*(value.float() for value in maps))


def _whitening(covariance: Tensor, tolerance: float) -> Tensor:
    """(D, r): columns V_i / s_i of the centred features' singular vectors and values, largest first."""
    values, vectors = torch.linalg.eigh(covariance)
    singular = values.clamp(min=0).sqrt().flip(0)
    used = singular > tolerance * singular[0]
    return vectors.flip(1)[:, used] / singular[used]
