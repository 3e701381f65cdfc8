"""Runs SAIL's reference files through our implementation and importer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Dinov2Config, Dinov2Model

from models.encoders.pooling import pool_tokens
from models.losses.barlow import barlow_twins
from models.losses.contrastive import SigmoidLoss, info_nce
from models.metrics.classification import class_vectors, top_k_accuracy, zero_shot_logits
from models.metrics.compositional import mmvp_accuracy, winoground_correct
from models.metrics.knn import knn_votes
from models.metrics.retrieval import recall_at, retrieval_ranks, validation_retrieval
from models.optim.parameter_groups import split_by_decay
from models.optim.schedules import warmup_constant, warmup_constant_cooldown, warmup_cosine
from models.sail.checkpoint import head_from_official, to_official
from models.sail.segmentation import SegmentationEncoder, predict_classes, sliding_window_logits
from tests.golden.harness import Case


def align(case: Case) -> dict[str, Tensor]:
    head = head_from_official(case.weights).eval()
    image, text = head.encode_image(case.inputs["image"]), head.encode_text(case.inputs["text"])
    out = {
        "image_features": image,
        "text_features": text,
        "logits_per_text": head.logits_per_text(image, text),
        "logit_scale": head.logit_scale.exp(),
    }
    if "extra_text" in case.inputs:
        out["extra_text_features"] = head.encode_text(case.inputs["extra_text"])
    if hasattr(head, "vision_norm"):
        out["vision_layer_norm"] = head.vision_norm(case.inputs["image"])
    return out


def losses(case: Case) -> dict[str, Tensor]:
    out = {}
    for name, keys in (("siglip", ["text"]), ("siglip_multi", ["text", "extra_text"])):
        if not case.inputs.keys() >= set(keys):
            continue
        leaves = {k: v.clone().requires_grad_() for k, v in case.inputs.items()}
        loss = SigmoidLoss()(leaves["image"], [leaves[k] for k in keys], leaves["logit_scale"], leaves["logit_bias"])
        loss.losses["contrastive"].backward()
        out |= {f"{name}.grad_{k}": leaf.grad for k, leaf in leaves.items() if leaf.grad is not None}
        out |= {f"{name}.{k}": v for k, v in loss.report.items()}
        out[f"{name}.contrastive_loss"] = loss.losses["contrastive"]
    image, text = case.inputs["image"], case.inputs["text"]
    out["clip.contrastive_loss"] = info_nce(image, text, case.inputs["logit_scale"])
    if case.config["barlow_lambda"] is not None:
        out["barlow.contrastive_loss"] = barlow_twins(image, text, case.config["barlow_lambda"])
    return out


def train_trace(case: Case) -> dict[str, Tensor]:
    from lion_pytorch import Lion

    config = case.config
    head = head_from_official(case.weights)
    hyper = {"lr": config["lr"], "weight_decay": config["weight_decay"], "betas": tuple(config["betas"])}
    if config["optimizer"] == "lion":
        optimizer = Lion(head.parameters(), **hyper)
    else:
        optimizer = torch.optim.AdamW(split_by_decay(head.named_parameters()), eps=config["eps"], **hyper)
    total, warmup = config["total_steps"], config["warmup_steps"]
    cosine = warmup_cosine(total, 1, config["lr"], warmup)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine)
    trace: dict[str, list] = {"losses": [], "lrs": [], "log_scales": []}
    for step in range(config["steps"]):
        trace["lrs"].append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        image = head.encode_image(case.inputs["image"][step])
        texts = [head.encode_text(case.inputs[key][step]) for key in ("text", "extra_text")]
        loss = SigmoidLoss()(image, texts, head.logit_scale.exp(), head.logit_bias).losses["contrastive"]
        loss.backward()
        optimizer.step()
        scheduler.step()
        with torch.no_grad():
            head.logit_scale.clamp_(0, torch.log(torch.tensor(100.0)).item())
        trace["losses"].append(loss.item())
        trace["log_scales"].append(head.logit_scale.item())
    out = {name: torch.tensor(values, dtype=torch.float64) for name, values in trace.items()}
    constant = warmup_constant(total, 1, config["lr"], warmup)
    cooldown = warmup_constant_cooldown(total, 1, config["lr"], warmup, config["cooldown_steps"])
    for name, multiplier in (("cosine", cosine), ("const", constant), ("const_cooldown", cooldown)):
        curve = [config["lr"] * multiplier(step) for step in range(total)]
        out[f"lr_{name}"] = torch.tensor(curve, dtype=torch.float64)
    return out | {f"final.{name}": value for name, value in to_official(head).items()}


def dinov2_from_weights(weights: dict[str, Tensor], num_attention_heads: int) -> Dinov2Model:
    """A DINOv2 whose sizes follow from its weights (transformers' names); only the number of heads cannot be read off."""
    projection = weights["embeddings.patch_embeddings.projection.weight"]
    hidden, _, patch, _ = projection.shape
    grid = int((weights["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    gated = "encoder.layer.0.mlp.weights_in.weight" in weights
    config = Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=1 + max(int(k.split(".")[2]) for k in weights if k.startswith("encoder.layer.")),
        num_attention_heads=num_attention_heads,
        image_size=grid * patch,
        patch_size=patch,
        mlp_ratio=4 if gated else weights["encoder.layer.0.mlp.fc1.weight"].shape[0] // hidden,
        use_swiglu_ffn=gated,
    )
    # from_pretrained, because transformers renames modules between versions and maps the released names itself.
    model, report = Dinov2Model.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
    assert not (report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]), report
    return model.eval()


def image_pooling(case: Case) -> dict[str, Tensor]:
    model = dinov2_from_weights(case.weights, case.config["num_attention_heads"])
    with torch.no_grad():
        pixels = case.inputs["pixel_values"]
        tokens = model(pixels).last_hidden_state
        patches = model.embeddings(pixels) - _without_positions(model, pixels)
    out = {"last_hidden_state": tokens, "pos_interpolated": patches[:1]}
    return out | {mode: pool_tokens(tokens, mode) for mode in ("concat", "cls", "patch", "patch_mode")}


def _without_positions(model, pixels: Tensor) -> Tensor:
    patches = model.embeddings.patch_embeddings(pixels)
    return torch.cat([model.embeddings.cls_token.expand(len(pixels), -1, -1), patches], dim=1)


def zeroshot_classification(case: Case) -> dict[str, Tensor]:
    head = head_from_official(case.weights).eval()
    classes = class_vectors(head.encode_text(case.inputs["text"]))
    logits = zero_shot_logits(head.encode_image(case.inputs["image"]), classes)
    labels = case.inputs["labels"]
    top = {f"top{k}": torch.tensor(top_k_accuracy(logits, labels, k), dtype=torch.float64) for k in (1, 5)}
    return {"zeroshot_weights": classes, "logits": logits, **top}


def metric_retrieval(case: Case) -> dict[str, Tensor]:
    image, text, per_image = case.inputs["image"], case.inputs["text"], case.config["captions_per_image"]
    owner = torch.arange(len(text)) // per_image
    i2t, t2i = retrieval_ranks(image, text, owner, tile_entries=999)
    out = {
        "sims": F.normalize(text, dim=-1) @ F.normalize(image, dim=-1).T,
        "i2t_recall": torch.tensor([recall_at(i2t, k) / 100 for k in case.config["k"]], dtype=torch.float64),
        "t2i_recall": torch.tensor([recall_at(t2i, k) / 100 for k in case.config["k"]], dtype=torch.float64),
    }
    ours = validation_retrieval(image, text[::per_image], case.config["k"])
    for name, value in ours.items():
        name = name.replace("i2t", "image_to_text").replace("t2i", "text_to_image").replace("recall", "R")
        out[f"val.{name}"] = torch.tensor(value / 100 if "R@" in name else value, dtype=torch.float64)
    return out


def metric_winoground(case: Case) -> dict[str, Tensor]:
    correct = winoground_correct(case.inputs["logits_per_text"])
    return {"correct": correct, "scores": correct.double().mean(dim=0)}


def metric_mmvp(case: Case) -> dict[str, Tensor]:
    accuracy = mmvp_accuracy(case.inputs["logits"], case.inputs["qid"], case.config["pairs_per_category"])
    return {"category_accuracy": accuracy, "average": accuracy.mean()}


def metric_knn(case: Case) -> dict[str, Tensor]:
    train, test = (F.normalize(case.inputs[name], dim=-1) for name in ("train", "test"))
    config = case.config
    votes = knn_votes(train, case.inputs["train_labels"], test, config["num_classes"], config["k"], config["temperature"])
    labels = case.inputs["test_labels"]
    return {f"top{k}": torch.tensor(top_k_accuracy(votes, labels, k), dtype=torch.float64) for k in (1, 5)}


def segmentation(case: Case) -> dict[str, Tensor]:
    config, out = case.config, {}
    vision = {k.removeprefix("vision."): v for k, v in case.weights.items() if k.startswith("vision.")}
    head = head_from_official({k: v for k, v in case.weights.items() if k.startswith("vlhead.")}).eval()
    backbone = dinov2_from_weights(vision, config["num_attention_heads"])
    pixels, queries = case.inputs["pixel_values"], case.inputs["query_features"]
    classes = torch.tensor(config["query_idx"])
    with torch.no_grad():
        for attention in ("qk", "qq"):
            for suffix, residual in (("res", True), ("nores", False)):
                encoder = SegmentationEncoder(backbone, attention, residual)
                logits = sliding_window_logits(
                    encoder, head, pixels, queries, config["crop"], config["stride"], tuple(config["ori_shape"])
                )
                scores = head.logit_scale * logits
                out[f"logits.{attention}_{suffix}"] = logits
                out[f"pred.{attention}_{suffix}"] = predict_classes(scores, classes, config["prob_thd"]).short()
                patch = config["patch_size"]
                height, width = (min(config["crop"], side) // patch * patch for side in pixels.shape[2:])
                out[f"encoder.{attention}_{suffix}"] = encoder(pixels[:, :, :height, :width])
    return out


RUNNERS = {
    "align": align,
    "align_sharelock": align,
    "losses": losses,
    "train_trace": train_trace,
    "image_pooling": image_pooling,
    "zeroshot_classification": zeroshot_classification,
    "metric_retrieval": metric_retrieval,
    "metric_winoground": metric_winoground,
    "metric_mmvp": metric_mmvp,
    "metric_knn": metric_knn,
    "segmentation": segmentation,
}
