"""Figures of manipulated pairs: boxes on the image, suspicious words marked in the caption; the truth is green."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image
from torch import Tensor

from experiments.figures.canvas import RIGHT, figure, frame, save
from models.hammer.evaluation import KINDS

if TYPE_CHECKING:
    from experiments.prediction.hammer import Finding

PREDICTED = "#d7191c"  # the colour of what the model points at
WORDS_PER_LINE = 9


class Truth(NamedTuple):
    """``kinds`` as DGM4 writes them, ``box`` (x1, y1, x2, y2) in pixels or empty, ``words`` numbers of manipulated words."""

    kinds: str
    box: Sequence[float]
    words: Sequence[int]


def findings(examples: Sequence[tuple[Image.Image, Finding, Truth | None]], path: Path) -> Path:
    """A row per pair: the image with the predicted box (red) and the true one (green, dashed), the verdict, and the caption
    with the predicted words red and the true ones underlined in green."""
    drawing, axes = figure(len(examples), 2, figsize=(9.5, 2.1 * len(examples)), width_ratios=[1, 3.6])
    for (left, right), (image, finding, truth) in zip(axes, examples, strict=True):
        left.imshow(image)
        left.axis("off")
        right.axis("off")
        if truth is not None and len(truth.box) == 4:
            _frame(left, truth.box, RIGHT, "--")
        if finding.box is not None:
            _frame(left, finding.box, PREDICTED, "-")
        likely = [f"{kind} {100 * chance:.0f} %" for kind, chance in finding.kinds.items() if chance >= 0.5]
        verdict = f"manipulated {100 * finding.manipulated:.0f} %   {', '.join(likely) or 'no kind above 50 %'}"
        right.text(0, 0.95, verdict, fontsize=9.5, weight="bold", va="top", transform=right.transAxes)
        if truth is not None:
            right.text(0, 0.78, f"truth: {truth.kinds}", fontsize=9, color=RIGHT, va="top", transform=right.transAxes)
        _caption(drawing, right, finding, truth)
    return save(drawing, path)


def _frame(axis: Any, box: Sequence[float], colour: str, style: str) -> None:
    x1, y1, x2, y2 = box
    frame(axis, x1 - 0.5, y1 - 0.5, x2 - x1, y2 - y1, color=colour, lw=2, ls=style)


def _caption(drawing: Any, axis: Any, finding: Finding, truth: Truth | None) -> None:
    """Word beside word, so that each can have its own colour."""
    renderer = drawing.canvas.get_renderer()
    for start in range(0, len(finding.words), WORDS_PER_LINE):
        x, y = 0.0, 0.55 - 0.2 * (start // WORDS_PER_LINE)
        for number, (word, chance) in enumerate(finding.words[start : start + WORDS_PER_LINE], start):
            style = {"color": PREDICTED, "weight": "bold"} if chance >= 0.5 else {"color": "#333333"}
            drawn = axis.text(x, y, word, fontsize=10, va="center", transform=axis.transAxes, **style)
            extent = drawn.get_window_extent(renderer).transformed(axis.transAxes.inverted())
            if truth is not None and number in truth.words:
                axis.plot([extent.x0, extent.x1], [extent.y0] * 2, color=RIGHT, lw=2, transform=axis.transAxes, clip_on=False)
            x = extent.x1 + 0.012


def kinds(predicted: Tensor, true: Tensor, path: Path) -> Path:
    """Share of the pairs with each true combination of kinds (rows) in which each kind is predicted (columns).

    Args:
        predicted, true: (N, 4) bool.
    """
    rows = sorted({tuple(row) for row in true.tolist()}, key=lambda row: (sum(row), [not kind for kind in row]))
    names = ["+".join(name for name, has in zip(KINDS, row, strict=True) if has) or "pristine" for row in rows]
    shares = [predicted[(true == true.new_tensor(row)).all(dim=1)].double().mean(dim=0).tolist() for row in rows]
    drawing, ((axis,),) = figure(figsize=(4.2, 0.42 * len(rows) + 1.2))
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            axis.text(x, y, f"{100 * share:.0f}", ha="center", va="center", color="white" if share > 0.6 else "#333333")
    for y, row in enumerate(rows):
        for x, has in enumerate(row):
            if has:
                frame(axis, x - 0.47, y - 0.46, 0.94, 0.92, color=RIGHT, lw=2)
    axis.set_xticks(range(4), KINDS)
    axis.set_yticks(range(len(rows)), names)
    axis.set(xlabel="predicted, percent of the row", title="kinds of manipulation (true ones framed)")
    return save(drawing, path)
