"""Runs freeze-align's reference files through our implementation and importer."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings

from datamodules.features.curation import (
    BestPerConcept,
    TopPerConcept,
    half_cosines,
    select_balanced,
)
from datamodules.transforms.augment import MAX_LEVEL, apply_operation
from models.encoders.positions import use_scaled_positions
from models.freeze_align.checkpoint import head_from_official, to_official
from models.freeze_align.fine_grained import fine_grained_loss
from models.freeze_align.localisation import LocalisationMeter
from models.losses.contrastive import info_nce
from models.metrics.cka import linear_hsic
from models.metrics.classification import descriptive_class_vectors, top_k_accuracy
from models.metrics.retrieval import recall_at, retrieval_ranks
from models.optim.schedules import cosine_per_epoch
from tests.golden.harness import Case

KERNEL_SIGMA = 3.0  # of `kernel_cka_sigma`, where the file's config does not name it
RETRIEVAL_K = (1, 5, 10)  # of `local_cka_retrieval`, likewise


def _f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def projector(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    pooled = config["text_pooling"] == "cls"
    head = head_from_official(case.weights, config["vis_pooling"], "pooled" if pooled else "mean").eval()
    assert all(torch.equal(value, case.weights[name]) for name, value in to_official(head).items())
    with torch.no_grad():
        head.clamp_scale()
    image = head.embed_image(inputs["image_tokens"])
    mask = inputs["attention_mask"].bool()
    text = head.embed_text(inputs["text_pooled"] if pooled else inputs["text_tokens"], mask)
    loss = info_nce(image.vector, text.vector, head.scale())
    out = {
        "image_features": F.normalize(image.vector, dim=-1),
        "text_features": F.normalize(text.vector, dim=-1),
        "image_tokens_projected": image.tokens,
        "text_tokens_projected": text.tokens,
        "sim_i2t": F.normalize(image.vector, dim=-1) @ F.normalize(text.vector, dim=-1).T * head.scale(),
        "loss_ita": loss,
    }
    total = loss
    if config["local_loss_weight"]:
        counts = words_that_count(inputs["input_ids"], mask, config["eos_token_id"])
        out["loss_fg"] = fine_grained_loss(image.tokens[:, 1:], text.tokens, counts, head.temperature, config["fg_thresh"])
        total = loss + config["local_loss_weight"] * out["loss_fg"]
    total.backward()
    return out | {"grad_temp": head.temperature.grad}


def cka(case: Case) -> dict[str, Tensor]:
    x, y, base = case.inputs["x"], case.inputs["y"], case.config["base"]
    queries = slice(base, base + case.config["query"])
    graph = local_cka(x[:base], y[:base], x[queries], y[queries])
    own = torch.arange(len(graph))
    sigma, ks = case.config.get("sigma", KERNEL_SIGMA), case.config.get("k", RETRIEVAL_K)
    return {
        "linear_hsic_xy": linear_hsic(x, y),
        "linear_cka": linear_cka(x, y),
        "kernel_cka_median": kernel_cka(rbf_kernel(x), rbf_kernel(y)),
        "kernel_cka_sigma": kernel_cka(rbf_kernel(x, sigma), rbf_kernel(y, sigma)),
        "rbf_x_median": rbf_kernel(x),
        "local_cka_graph": graph,
        "local_cka_retrieval": torch.stack([_f64(top_k_accuracy(graph, own, k) / 100) for k in ks]),
    }


def metric_retrieval(case: Case) -> dict[str, Tensor]:
    ranks = retrieval_ranks(case.inputs["image"], case.inputs["text"], case.inputs["owner"])
    out: dict[str, Tensor] = {}
    ks = sorted(int(match[1]) for key in case.config["keys"] if (match := re.fullmatch(r"txt_r(\d+)", key)))
    for name, found in zip(("txt", "img"), ranks, strict=True):
        recalls = {k: _f64(recall_at(found, k)) for k in ks}
        out |= {f"{name}_r{k}": value for k, value in recalls.items()}
        out[f"{name}_r_mean"] = torch.stack(list(recalls.values())).mean()
    return out | {"r_mean": (out["txt_r_mean"] + out["img_r_mean"]) / 2}


def zeroshot_vdt(case: Case) -> dict[str, Tensor]:
    config = case.config
    classes = descriptive_class_vectors(case.inputs["text_features"], config["prompt_counts"])
    scores = keep_top_scores(F.normalize(case.inputs["image_features"], dim=-1) @ classes, config["k_test"])
    accuracy = [top_k_accuracy(scores, case.inputs["labels"], k) / 100 for k in config["topk"]]
    return {"class_weights": classes.T, "scores": scores, "accuracy": torch.tensor(accuracy, dtype=torch.float64)}


def lr_schedule(case: Case) -> dict[str, Tensor]:
    config = case.config
    total = config["epochs"] * config["iterations_per_epoch"]
    multiplier = cosine_per_epoch(
        total,
        config["iterations_per_epoch"],
        config["lr"],
        min_lr=config["min_lr"],
        warmup_lr=config["warmup_lr"],
        warmup_stairs=config["warmup_epochs"],
        steps_per_stair=config["warmup_step_size"],
    )
    return {"lr": torch.tensor([config["lr"] * multiplier(step) for step in range(total)], dtype=torch.float64)}


def curation(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    cosines = half_cosines(inputs["caption_embeds"], inputs["prototypes"])
    low, high = config["int8_range"]
    table, keep, ids = inputs["score_table"].float() / 128, config["max_amount"], inputs["sample_ids"]
    best = BestPerConcept(config["classes"], keep)
    for start in range(0, len(table), config["sort_batch"]):
        best.add(table[start : start + config["sort_batch"]], start)
    found = best.result()
    if found.rows.shape[1] < keep:  # the official lists begin with a sentinel, which a small pool does not push out
        found = TopPerConcept(F.pad(found.scores, (0, 1), value=-2.0), F.pad(found.rows, (0, 1), value=-1))
    chosen = select_balanced(found, config["per_class"], len(table))
    columns = (ids[torch.from_numpy(chosen.rows)], torch.from_numpy(chosen.concepts), torch.from_numpy(chosen.scores))
    return {
        "cos_half": cosines.float(),
        "int8_from_cosine": quantise_scores(cosines, low, high),
        "top_scores": found.scores.T,
        "top_ids": torch.where(found.rows < 0, -2.0, ids[found.rows]).T,
        "selected": torch.stack([column.double() for column in columns], dim=1),
    }


def augment(case: Case) -> dict[str, np.ndarray]:
    image, config = case.inputs["image"].numpy(), case.config
    out = {}
    for name in case.wanted:
        operation, _, sign = name.partition("_")
        level = (-1 if sign == "neg" else 1) * config["level"] / MAX_LEVEL
        out[name] = torch.from_numpy(np.array(apply_operation(operation, image, level, True, True)))
    return out


def metric_voc_iou(case: Case) -> dict[str, Tensor]:
    config = case.config
    meter = LocalisationMeter(config["threshold"])
    for similarity, mask in zip(case.inputs["sims"], case.inputs["masks"], strict=True):
        scale = config["size"] // len(mask)
        labels = mask.repeat_interleave(scale, dim=0).repeat_interleave(scale, dim=1)
        meter.add(similarity.T.unflatten(1, (config["grid"], config["grid"])), labels)
    result = meter.result()
    return {"instance_iou": _f64(result.per_image / 100), "class_iou": _f64(result.per_class / 100)}


def dinov2_embeddings(case: Case) -> dict[str, Tensor]:
    config, out = case.config, {}
    sizes = {name: config[name] for name in ("hidden_size", "image_size", "patch_size")}
    embeddings = Dinov2Embeddings(Dinov2Config(**sizes)).eval()
    embeddings.load_state_dict(case.weights)
    use_scaled_positions(embeddings)
    with torch.no_grad():
        for height, width in config["runs"]:
            name = f"{height}x{width}"
            pixels = case.inputs[f"pixel_values.{name}"]
            out[f"embeddings.{name}"] = embeddings(pixels)
            out[f"position.{name}"] = embeddings.interpolate_pos_encoding(out[f"embeddings.{name}"], height, width)
    return out


# CKA in freeze-align's forms, which nothing but its reference files asks for.


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA of (n, dx) and (n, dy), in [0, 1]; give float64 where many digits matter."""
    return linear_hsic(x, y) / (linear_hsic(x, x) * linear_hsic(y, y)).sqrt()


def quantise_scores(scores: Tensor, low: float = -0.3, high: float = 0.4) -> Tensor:
    """Cosines as int8, [low, high] to [-128, 127]; read back as ``q / 128``.

    What lies outside is clipped value by value. The official code meant to do so, but there one score out of range
    overwrites the whole batch. We keep half-precision scores and need this for official files.
    """
    return ((2 * (scores.half() - low) / (high - low) - 1) * 128).float().trunc().clamp(-128, 127).to(torch.int8)


def keep_top_scores(scores: Tensor, k: int, rest: float = -100.0) -> Tensor:
    """Scores (N, C) with all but the ``k`` highest of each row set to ``rest`` (freeze-align's evaluations)."""
    best, place = scores.topk(min(k, scores.shape[1]), dim=1)
    return torch.full_like(scores, rest).scatter_(1, place, best)


def words_that_count(input_ids: Tensor, mask: Tensor, eos: int) -> Tensor:
    """The attention mask (B, L) without the first position and the first end-of-sequence token of each text."""
    is_eos = input_ids == eos
    first_eos = is_eos & (is_eos.cumsum(dim=1) == 1)
    counts = mask.bool() & ~first_eos
    counts[:, 0] = False
    return counts


def rbf_kernel(x: Tensor, sigma: float | Tensor | None = None) -> Tensor:
    """``exp(-|xi - xj|² / (2 sigma²))`` (n, n); ``sigma`` None is the root of the (lower) median non-zero squared distance."""
    gram = x @ x.T
    own = gram.diagonal()
    squared = (own[None, :] - gram) + (own[:, None] - gram)
    if sigma is None:
        sigma = squared[squared != 0].median().sqrt()
    return torch.exp(-squared / (2 * sigma**2))


def kernel_cka(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741 - K and L are the field's names
    """CKA of two kernel matrices (n, n)."""
    k, l = _centred(k), _centred(l)  # noqa: E741
    return (k * l).sum() / (k.square().sum() * l.square().sum()).sqrt()


def local_cka(x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
    """(q, r): linear CKA of the base pairs (n, dx), (n, dy) with one query pair added, for all q x r query pairs.

    The highest entry of a row is the match of that query among ``query_y`` (freeze-align's training-free retrieval).
    """
    # One sample more is a rank-one change of every covariance, so the base is gone through once.
    n = len(x)
    factor = n / (n + 1)
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    a, b = query_x - x_mean, query_y - y_mean  # (q, dx), (r, dy)
    cross = x.T @ y
    norm_x, norm_y = _grown(x, a, factor), _grown(y, b, factor)
    hsic = cross.square().sum() + 2 * factor * a @ cross @ b.T
    hsic = hsic + factor**2 * a.square().sum(dim=1)[:, None] * b.square().sum(dim=1)[None, :]
    return hsic / (norm_x[:, None] * norm_y[None, :]).sqrt()


def _grown(x: Tensor, a: Tensor, factor: float) -> Tensor:
    """``|XᵀX + factor a aᵀ|²_F`` for each row of ``a``."""
    covariance = x.T @ x
    inner = ((a @ covariance) * a).sum(dim=1)
    return covariance.square().sum() + 2 * factor * inner + factor**2 * a.square().sum(dim=1).square()


def _centred(kernel: Tensor) -> Tensor:
    return kernel - kernel.mean(dim=0, keepdim=True) - kernel.mean(dim=1, keepdim=True) + kernel.mean()


RUNNERS = {
    "projector": projector,
    "projector_finegrained": projector,
    "cka": cka,
    "metric_retrieval": metric_retrieval,
    "zeroshot_vdt": zeroshot_vdt,
    "lr_schedule": lr_schedule,
    "curation": curation,
    "augment": augment,
    "metric_voc_iou": metric_voc_iou,
    "dinov2_embeddings": dinov2_embeddings,
}
