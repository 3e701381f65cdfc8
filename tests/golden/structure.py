"""Runs STRUCTURE's reference files through our implementation and importer."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from models.alignment.head import AlignmentHead
from models.losses.contrastive import info_nce
from models.losses.structure import Divergence, StructureRegulariser, structure_loss
from models.metrics.classification import class_vectors, top_k_accuracy, zero_shot_logits
from models.metrics.embedding_quality import trustworthiness
from models.metrics.neighbourhoods import METRICS, LayerPairs, best_pair, hop_similarity
from models.metrics.retrieval import grouped_retrieval
from models.optim.clipping import clip_each_
from models.optim.lr_range import range_test
from models.optim.schedules import repeating_cosine
from models.structure.checkpoint import head_from_official, to_official
from models.structure.csa import CSAMaps, covariances, csa
from tests.golden.harness import Case

_OPTIONS = {"distance_type": "distance", "centering_type": "centring"}  # official argument -> ours
_CLASSIC = "an unused class that mixes up u and its transpose, so that it is no CCA; not exposed"
NOT_REPRODUCED = {
    ("csa", f"cca_classic.{name}"): _CLASSIC for name in ("abs_image_test", "abs_text_test", "corr_coeff", "sim_test")
}


def _f32(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def reg(case: Case) -> dict[str, Tensor]:
    out = {}
    for name, options in case.config["cases"].items():
        aligned = case.inputs["aligned"].clone().requires_grad_()
        options = {_OPTIONS.get(key, key): value for key, value in options.items()}
        value = structure_loss(case.inputs["original"], aligned, divergence="reversed", **options)
        out[f"{name}.value"] = value
        if value.requires_grad and f"{name}.grad_aligned" in case.wanted:
            out[f"{name}.grad_aligned"] = torch.autograd.grad(value, aligned)[0]
    first = next(iter(case.config["cases"].values()))["temperature"]
    z = F.normalize(case.inputs["original"], dim=-1)
    z = z - z.mean(dim=0)
    walk = (z @ z.T / first).softmax(dim=1)
    return out | {"P_original_level1": walk, "P_original_level2": walk @ walk}


def _regulariser(loss: dict) -> StructureRegulariser:
    """The official configuration as ours."""
    return StructureRegulariser(
        weight=loss["structure_lambda"],
        warmup_steps=loss["warmup_steps"],
        levels=loss["structure_levels"],
        weighting=loss["structure_weighting"],
        temperature=loss["temperature"],
        margin=loss.get("structure_margin", 0.0),
        divergence="reversed",
    )


def train(case: Case) -> dict[str, Tensor]:
    config = case.config
    gate = {"dropout": config["layer"].get("dropout_p", 0.1)}
    head = head_from_official(case.weights, config["loss"]["temperature"], **gate).eval()
    assert not head.logit_scale.requires_grad
    regulariser = _regulariser(config["loss"])
    trained = [p for p in head.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config["lr"], betas=tuple(config["betas"]), weight_decay=config["weight_decay"])
    cosine = repeating_cosine(config["steps"], 1, config["lr"], period=config["cosine_T_max"])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    image_features, text_features = case.inputs["image_features"], case.inputs["text_features"]
    trace: dict[str, list[float]] = {}
    out: dict[str, Tensor] = {}
    for step in range(config["steps"]):
        first = step * config["batch"] % config["N"]
        rows = slice(first, first + config["batch"])
        image, text = head.encode_image(image_features[rows]), head.encode_text(text_features[rows])
        if step == 0:
            out |= {"aligned_image_step0": image.detach().clone(), "aligned_text_step0": text.detach().clone()}
        clip = info_nce(image, text, head.scale())
        pairs = [(image_features[rows], image), (text_features[rows], text)]
        for i, (name, encode) in enumerate((("add_image", head.encode_image), ("add_text", head.encode_text))):
            if name in case.inputs:  # all unpaired samples join the regulariser of their modality
                extra = case.inputs[name]
                pairs[i] = regulariser.with_extra(pairs[i], (extra, encode(extra)))
        kept = regulariser(pairs, step)
        total = clip if kept is None else clip + kept.loss
        now = {
            "clip_loss": clip.item(),
            "structure_loss_wo_lambda": math.nan if kept is None else kept.report["structure"].item(),
            "structure_loss": math.nan if kept is None else kept.loss.item(),
            "overall_loss": total.item(),
            "lambda": regulariser.weight_at(step),
            "lr": optimizer.param_groups[0]["lr"],
        }
        for name, value in now.items():
            trace.setdefault(name, []).append(value)
        optimizer.zero_grad()
        total.backward()
        if step == config["steps"] - 1:
            out |= _gradients(head)
        if config["clip_grad"]:
            clip_each_(trained, config["clip_grad"])
        optimizer.step()
        scheduler.step()
    out |= {f"final.{name}": value for name, value in to_official(head).items()}
    return out | {name: torch.tensor(values, dtype=torch.float32) for name, values in trace.items()}


def _gradients(head: AlignmentHead) -> dict[str, Tensor]:
    """Gradients by official name."""
    values = {name: p.detach().clone() for name, p in head.named_parameters()}
    with torch.no_grad():
        for p in head.parameters():
            if p.grad is not None:
                p.copy_(p.grad)
        named = {k.replace("alignment_", ""): v for k, v in to_official(head).items()}
        for name, p in head.named_parameters():
            p.copy_(values[name])
    return {f"grad_last_unclipped.{name}": value for name, value in named.items()}


def metrics(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    x, y = inputs["x_feats"], inputs["y_feats"]
    # Entry 0 of each axis is the concatenation of all layers, which the official code scores beside them.
    sides = [[side.flatten(1), *side.unbind(dim=1)] for side in (x, y)]
    pairs = LayerPairs(*sides, k=config["topk"], normalise=config["normalize"])
    out: dict[str, Tensor] = {"hcs_layer0": _f32(hop_similarity(x[:, 0], y[:, 0]))}
    for metric in METRICS:
        out[metric] = pairs.scores(metric)
        out[f"{metric}.best_indices"] = torch.tensor(best_pair(out[metric])) - 1
    x_last, y_last = x[:, -1], y[:, -1]
    for name in case.wanted:
        kind, _, k = name.partition("_k")
        if kind in ("trustworthiness", "continuity"):
            before, after = (x_last, y_last) if kind == "trustworthiness" else (y_last, x_last)
            out[name] = _f32(trustworthiness(before, after, int(k)))
    if config["retrieval_k"]:
        groups = {"retrieval": inputs["retrieval_group"], "retrieval_nogroup": torch.arange(len(inputs["retrieval_image"]))}
        for name, group in groups.items():
            found = grouped_retrieval(inputs["retrieval_image"], inputs["retrieval_text"], group, config["retrieval_k"])
            out |= {f"{name}.{key}": _f32(value / 100) for key, value in found.items()}
    if config["zs"]:
        out |= _zero_shot(case)
    if config["lr_finder"]:
        out["lr_finder"] = torch.tensor(_lr_finder(case), dtype=torch.float64)
    return out


def _zero_shot_head(case: Case) -> AlignmentHead:
    return head_from_official({k.removeprefix("zs_"): v for k, v in case.weights.items() if k.startswith("zs_")})


def _zero_shot(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config["zs"], case.inputs
    head = _zero_shot_head(case)
    prompts = head.encode_text(inputs["zs_text_features"][:, config["text_layer"]])
    classes = class_vectors(prompts.unflatten(0, (config["classes"], config["templates"])))
    logits = zero_shot_logits(head.encode_image(inputs["zs_image_features"]), classes)
    labels, out = inputs["zs_targets"], {"zs_classifier": classes.T, "zs_logits": logits}
    for k in (1, 5):
        out[f"zs_top{k}_micro"] = _f32(top_k_accuracy(logits, labels, k) / 100)
        out[f"zs_top{k}_macro"] = _f32(balanced_top_k(logits, labels, k) / 100)
    return out


def balanced_top_k(logits: Tensor, labels: Tensor, k: int) -> float:
    """Mean over the classes that occur of their top-``k`` accuracy, in percent."""
    per_class = [top_k_accuracy(logits[labels == c], labels[labels == c], k) for c in labels.unique()]
    return sum(per_class) / len(per_class)


def _lr_finder(case: Case) -> float:
    config = case.config["lr_finder"]
    head = _zero_shot_head(case)
    image, text = case.inputs["lr_image_features"], case.inputs["lr_text_features"]
    regulariser = StructureRegulariser(weight=10.0, warmup_steps=0, levels=1, weighting="none", divergence="reversed")

    def loss(_: int) -> Tensor:
        a, b = head.encode_image(image), head.encode_text(text)
        return info_nce(a, b, head.scale()) + regulariser([(image, a), (text, b)], 0).loss

    return range_test(
        head,
        lambda parameters: torch.optim.AdamW(parameters, betas=(0.9, 0.95), weight_decay=1e-4),
        loss,
        iterations=config["num_iter"],
        start=config["start_lr"],
        end=config["end_lr"],
    )


def csa_maps(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    image, text = inputs["image_train"], inputs["text_train"]
    half = len(image) // 2
    maps = csa(covariances([(image[:half], text[:half]), (image[half:], text[half:])]), config["sim_dim"])
    out = _csa_outputs("cca", maps, case)
    options = config["reg"]
    if options is None:
        return out
    # Each pair of columns may be flipped: the refined maps are compared in the signs of the file's closed form.
    signs = (maps.image_map * case.weights["cca.W_image"]).sum(dim=0).sign()
    maps = maps._replace(image_map=maps.image_map * signs, text_map=maps.text_map * signs)
    refined = refine(
        maps,
        image,
        text,
        levels=options["L"],
        temperature=options["tau"],
        structure_weight=options["lambda_rs"],
        correlation_weight=options["lambda_cca_coeff"],
        epochs=options["refine_epochs"],
        batch_size=len(image),
        lr=options["lr"],
        divergence="reversed",
    )
    out |= _csa_outputs("cca_rs", refined, case)
    return out | {"cca_rs.W_image": refined.image_map, "cca_rs.W_text": refined.text_map}


def refine(
    start: CSAMaps,
    image: Tensor,
    text: Tensor,
    levels: int = 1,
    temperature: float = 0.2,
    structure_weight: float = 10.0,
    correlation_weight: float = 0.01,
    epochs: int = 10,
    batch_size: int = 4096,
    lr: float = 5e-4,
    divergence: Divergence = "js",
    whiten: bool = False,
    generator: torch.Generator | None = None,
) -> CSAMaps:
    """Gradient steps from the closed form that trade correlation for STRUCTURE's regulariser. Library only: no recipe runs it.

    Args:
        start: maps in closed form.
        image: training features (N, Dx).
        text: training features (N, Dt).
        divergence: see :func:`~models.losses.structure.structure_loss`.
        whiten: multiply each map by the inverse root of its outputs' covariance afterwards, as the paper says; the
            official code does not.
        generator: draws the order of each epoch.
    """
    image, text = image - start.mean_image, text - start.mean_text
    maps = [start.image_map.clone().requires_grad_(), start.text_map.clone().requires_grad_()]
    optimizer = torch.optim.Adam(maps, lr=lr)
    with torch.enable_grad():
        for _ in range(epochs):
            order = torch.randperm(len(image), generator=generator).to(image.device)
            for rows in order.split(batch_size):
                x, t = image[rows], text[rows]
                a, b = F.normalize(x @ maps[0], dim=-1), F.normalize(t @ maps[1], dim=-1)
                penalty = sum(structure_loss(raw, z, levels, temperature, "inverse", divergence) for raw, z in ((x, a), (t, b)))
                loss = structure_weight * penalty / 2 - correlation_weight * (a * b).sum() / a.shape[1]
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
    maps = [mapping.detach() for mapping in maps]
    if whiten:
        maps = [_whiten_outputs(features, mapping) for features, mapping in ((image, maps[0]), (text, maps[1]))]
    return start._replace(image_map=maps[0], text_map=maps[1])


def _whiten_outputs(features: Tensor, mapping: Tensor) -> Tensor:
    """``W C^(-1/2)`` with ``C = Wᵀ Xᵀ X W / N``."""
    projected = (features @ mapping).double()
    values, vectors = torch.linalg.eigh(projected.T @ projected / len(features))
    return (mapping.double() @ (vectors / values.sqrt()) @ vectors.T).float()


def similarity_weights(maps: CSAMaps, image: Tensor, text: Tensor) -> Tensor:
    """(k,): mean absolute product of each dimension of the unit-length embeddings of the training pairs.

    The weights of CSA's own similarity; the official code stores but never uses them.
    """
    a, b = F.normalize(maps.image(image), dim=-1), F.normalize(maps.text(text), dim=-1)
    return (a * b).sum(dim=0).abs() / len(a)


def _csa_outputs(name: str, maps, case: Case) -> dict[str, Tensor]:
    a, b = maps.image(case.inputs["image_test"]), maps.text(case.inputs["text_test"])
    return {
        f"{name}.abs_image_test": a.abs(),
        f"{name}.abs_text_test": b.abs(),
        f"{name}.abs_W_image": maps.image_map.abs(),
        f"{name}.abs_W_text": maps.text_map.abs(),
        f"{name}.sim_test": F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T,
        f"{name}.corr_coeff": similarity_weights(maps, case.inputs["image_train"], case.inputs["text_train"]),
    }


RUNNERS = {"reg": reg, "train": train, "metrics": metrics, "csa": csa_maps}
