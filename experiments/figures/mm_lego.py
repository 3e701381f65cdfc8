"""Figures of patients and modalities: survival by risk, latents in the frequency domain, merge weights, curves, cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from experiments.figures.canvas import figure, save
from models.mm_lego.metrics import kaplan_meier, log_rank_p

COLOURS = {"low risk": "#2c7bb6", "high risk": "#d7191c"}


def kaplan_meier_by_risk(times: Tensor, censored: Tensor, high: Tensor, path: Path) -> Path:
    """Survival of the samples with a higher and with a lower predicted risk than the median, and the log-rank p.

    A patient with two slides is two samples.

    Args:
        times: (N,) of the event or the last visit.
        censored: (N,) bool.
        high: (N,) bool, the samples of high risk.
    """
    drawing, ((axis,),) = figure(figsize=(5.2, 3.8), layout="constrained")
    last = float(times.max())
    for name, group in (("low risk", ~high), ("high risk", high)):
        at, curve = kaplan_meier(times[group], censored[group])
        x, y = [0.0, *at.tolist(), last], [1.0, *curve.tolist(), float(curve[-1]) if len(curve) else 1.0]
        axis.step(x, y, where="post", color=COLOURS[name], label=f"{name}, {int(group.sum())} samples", linewidth=1.6)
        lost = times[group & censored]
        level = [y[max(i for i, t in enumerate(x[:-1]) if t <= float(time))] for time in lost]
        axis.plot(lost.tolist(), level, "|", color=COLOURS[name], markersize=5, alpha=0.6)
    p = log_rank_p(times.double(), censored, high)
    axis.set(xlabel="time", ylabel="survival", ylim=(0, 1.03), title=f"Kaplan-Meier by predicted risk, log-rank p = {p:.2g}")
    axis.legend(frameon=False, fontsize=8)
    return save(drawing, path)


def spectra(latents: Mapping[str, Tensor], path: Path) -> Path:
    """Mean magnitudes (L, D) of latents: frequency down, channel across, each in its own scale."""
    drawing, (axes,) = figure(1, len(latents), figsize=(2.6 * len(latents), 2.9), layout="constrained")
    for axis, (name, values) in zip(axes, latents.items(), strict=True):
        image = axis.imshow(values.numpy(), cmap="magma", aspect="auto", interpolation="nearest")
        axis.set(title=name, xlabel="channel")
        drawing.colorbar(image, ax=axis, shrink=0.7)
    axes[0].set_ylabel("frequency")
    return save(drawing, path)


def bars(values: Mapping[str, float], label: str, path: Path) -> Path:
    """One bar for each name."""
    drawing, ((axis,),) = figure(figsize=(5, 0.35 * len(values) + 1), layout="constrained")
    axis.barh([*values], [*values.values()], color="#4575b4")
    axis.invert_yaxis()
    axis.set(xlabel=label)
    return save(drawing, path)


def intervals(values: Mapping[str, tuple[float, float, float]], label: str, chance: float, path: Path) -> Path:
    """Value, lower and upper bound for each method, and a line at chance."""
    drawing, ((axis,),) = figure(figsize=(5.6, 0.36 * len(values) + 1), layout="constrained")
    for position, (value, low, high) in enumerate(values.values()):
        axis.errorbar(value, position, xerr=[[value - low], [high - value]], fmt="o", color="#4575b4", capsize=3)
    axis.axvline(chance, color="#999999", linestyle="--", linewidth=1)
    axis.set_yticks(range(len(values)), [*values])
    axis.invert_yaxis()
    axis.set(xlabel=label)
    return save(drawing, path)


def curves(series: Mapping[str, Mapping[float, float]], path: Path, labels: Mapping[str, str]) -> Path:
    """One line for each name through its points; ``labels`` as matplotlib's ``set``."""
    drawing, ((axis,),) = figure(figsize=(5.6, 3.8), layout="constrained")
    for number, (name, points) in enumerate(series.items()):
        style = "-" if number < 10 else "--"  # ten colours
        axis.plot([*points], [*points.values()], marker=".", label=name, linewidth=1.5, linestyle=style)
    axis.set(**labels)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return save(drawing, path)


def cost(table: Mapping[int, Mapping[str, float]], path: Path) -> Path:
    """Parameters, time and memory over the number of modalities."""
    names: Sequence[str] = [*next(iter(table.values()))]
    drawing, (axes,) = figure(1, len(names), figsize=(3 * len(names), 2.9), layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        axis.plot([*table], [row[name] for row in table.values()], marker="o", color="#4575b4")
        axis.set(xlabel="modalities", title=name, ylim=(0, None), xlim=(0, None))
        axis.grid(alpha=0.25)
    return save(drawing, path)
