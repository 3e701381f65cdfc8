"""Runs HAMMER's reference files through our implementation and importer."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou_loss

from datamodules.tokenizers.word_labels import CaptionTokenizer, clean_caption
from datamodules.transforms.augment import MAX_LEVEL, apply_operation
from datamodules.transforms.image_box import box_target, image_tensor
from experiments.benchmarks.reference.hammer import similarities
from lightning_modules.hammer import HammerModule
from models.batch import IGNORE_INDEX
from models.hammer.batch import BOX, FAKE, MULTI_LABEL, TOKEN_LABELS
from models.hammer.checkpoint import load_official, named_tensors
from models.hammer.contrastive import manipulation_contrastive
from models.hammer.grounding import box_losses, paired_iou
from models.hammer.metrics import (
    binary_metrics,
    box_metrics,
    evaluation_iou,
    grounding_iou,
    multi_label_metrics,
    token_metrics,
)
from models.hammer.model import Hammer
from models.hammer.parameter_groups import hammer_groups
from models.io import CheckpointError
from models.layers.feature_queue import enqueue_
from models.metrics.average_precision import average_precision
from models.optim.schedules import cosine_per_epoch
from tests.golden.harness import Case

# Official names of the loss terms and weights -> ours.
TERMS = {
    "MAC": "contrastive", "BIC": "binary", "MLC": "multi_label", "bbox": "box_l1", "giou": "box_giou", "TMG": "token",
}  # fmt: skip


def _model(case: Case) -> Hammer:
    config = case.config
    heads = {"vision_heads": config["vit_heads"], "text_heads": config["bert_heads"], "grounding_heads": config["lpaa_heads"]}
    return hammer_from_official(case.weights, momentum=config["momentum"], dropout=0.0, **heads)


def hammer_from_official(weights: dict[str, Tensor], **heads_and_more: Any) -> Hammer:
    """A model of the sizes that ``weights`` (official names) show, with these weights."""
    model = Hammer(**{**sizes_from_official(weights), **heads_and_more})
    load_official(model, weights)
    return model


def sizes_from_official(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of :class:`Hammer` that the shapes of a HAMMER checkpoint tell; the numbers of heads are not
    among them (officially 12 everywhere). Raises CheckpointError for other files."""
    weights = named_tensors(weights)
    try:
        patches, patch = weights["visual_encoder.pos_embed"], weights["visual_encoder.patch_embed.proj.weight"]
        words = weights["text_encoder.bert.embeddings.word_embeddings.weight"]
        layer = "text_encoder.bert.encoder.layer."
        crossing = [_index(key, layer) for key in weights if key.startswith(layer) and ".crossattention." in key]
        return {
            "image_size": round((patches.shape[1] - 1) ** 0.5) * patch.shape[-1],
            "patch_size": patch.shape[-1],
            "width": patch.shape[0],
            "vision_layers": _count(weights, "visual_encoder.blocks."),
            "mlp_ratio": weights["visual_encoder.blocks.0.mlp.fc1.weight"].shape[0] / patch.shape[0],
            "text_layers": _count(weights, layer),
            "fusion_layer": min(crossing),
            "text_intermediate": weights[f"{layer}0.intermediate.dense.weight"].shape[0],
            "vocab_size": words.shape[0],
            "max_positions": weights["text_encoder.bert.embeddings.position_embeddings.weight"].shape[0],
            "embed_dim": weights["vision_proj.weight"].shape[0],
            "queue_size": weights["image_queue"].shape[1] if "image_queue" in weights else 65536,
        }
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"these are not the weights of HAMMER ({error}); first keys: {sorted(weights)[:5]}") from error


def _index(key: str, prefix: str) -> int:
    return int(key.removeprefix(prefix).split(".")[0])


def _count(weights: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(_index(key, prefix) for key in weights if key.startswith(prefix))


def _heads(output) -> dict[str, Tensor]:
    return {
        "logits_real_fake": output.real_fake,
        "logits_multicls": output.multi_label,
        "output_coord": output.box,
        "logits_tok": output.token,
        "image_embeds": output.image,
        "text_embeds": output.text,
        "multimodal_embeds": output.fused,
        "it_cross_attn": output.grounded,
        "lpaa": output.pooled,
    }


def eval_forward(case: Case) -> dict[str, Tensor]:
    model = _model(case).eval()
    with torch.no_grad():
        return _heads(model(case.inputs["image"], case.inputs["input_ids"], case.inputs["attention_mask"]))


def train_forward(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    model = _model(case).train()
    weights = {TERMS[name]: weight for name, weight in config["loss_weights"].items()}
    options = {"token_momentum": config["token_momentum"], "label_smoothing": config["label_smoothing"]}
    module = HammerModule(lambda: model, loss_weights=weights, alpha=config["alpha"], **options)
    batch = {
        FAKE: torch.tensor([int(label != "orig") for label in config["labels"]]),
        MULTI_LABEL: inputs["multi_label"],
        BOX: inputs["fake_image_box"],
        TOKEN_LABELS: inputs["token_label"],
    }
    captions = inputs["image"], inputs["input_ids"], inputs["attention_mask"]
    model.update_momentum()
    model.clamp_temperature()
    momentum = model.momentum_forward(*captions, tokens=config["token_momentum"])
    output = model(*captions)
    losses = module.losses(batch, output, momentum, config["alpha"])
    total = sum(module.loss_weights[name] * value for name, value in losses.items())
    total.backward()
    model.enqueue(momentum.image, momentum.text)
    out = _heads(output) | {f"loss_{name}": losses[ours] for name, ours in TERMS.items()}
    image, text = model.features(output)
    out |= {"loss_total": total, "image_feat": image, "text_feat": text}
    out |= {"image_feat_m": momentum.image, "text_feat_m": momentum.text}
    if momentum.token is not None:
        out["token_logits_m"] = momentum.token
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    out |= {f"grad.{name}": p.grad for name, p in trained.items()}
    out["grad_norm_all"] = torch.stack([p.grad.norm() for p in trained.values()]).norm()
    return out | {f"after.{name}": value for name, value in model.state_dict().items()}


def mac_loss(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("image_proj", "text_proj")}
    temperature = inputs["temp"].clone().clamp_(0.001, 0.5).requires_grad_()
    features = [F.normalize(leaves[name], dim=-1) for name in ("image_proj", "text_proj")]
    features += [F.normalize(inputs[name], dim=-1) for name in ("image_proj_m", "text_proj_m")]
    queues = inputs["image_queue"].clone(), inputs["text_queue"].clone()
    rest = (*queues, temperature, inputs["is_real"], config["alpha"])
    terms = manipulation_contrastive(*features, *rest, tile=7)
    terms.mean.backward()
    out = {f"loss_{name}": value for name, value in terms._asdict().items()} | {"loss_MAC": terms.mean}
    # Ours never holds these matrices; what they say about the loss is compared through its value and gradients above.
    out |= {f"sim_{name}": value for name, value in similarities(*features, *rest)._asdict().items()}
    out |= {f"grad.{name}": leaf.grad for name, leaf in leaves.items()} | {"grad.temp": temperature.grad}
    pointer = int(inputs["queue_ptr"])
    for queue, momentum in zip(queues, features[2:], strict=True):
        after = enqueue_(queue, momentum, pointer)
    out |= {"after.image_queue": queues[0], "after.text_queue": queues[1], "after.queue_ptr": torch.tensor([after])}
    return out | {"temp_after_clamp": temperature}


def bbox_losses(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs
    target = inputs["target_cxcywh"]
    predicted = inputs["pred_cxcywh"].clone().requires_grad_()
    l1, giou = box_losses(predicted, target)
    (l1 + 2 * giou).backward()
    out = {"loss_bbox": l1, "loss_giou": giou, "grad_l1_plus_2giou": predicted.grad}
    variants = {
        "masked": box_losses(inputs["pred_cxcywh"], target, keep=inputs["is_image"] == 0),
        "degenerate": box_losses(inputs["pred_degenerate"], target),
    }
    for name, (l1, giou) in variants.items():
        out |= {f"loss_bbox_{name}": l1, f"loss_giou_{name}": giou}
    corners, target_corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (inputs["pred_cxcywh"], target))
    iou, union = paired_iou(corners, target_corners)
    out |= {"pred_xyxy": corners, "roundtrip_cxcywh": box_convert(corners, "xyxy", "cxcywh"), "iou": iou, "union": union}
    out["giou"] = 1 - generalized_box_iou_loss(corners, target_corners, eps=0.0)
    return out | {"eval_iou": evaluation_iou(inputs["eval_pred_xyxy"], inputs["eval_target_xyxy"])}


def metrics(case: Case) -> dict[str, Tensor]:
    inputs = case.inputs
    binary = binary_metrics(inputs["logits_real_fake"], inputs["is_fake"])
    out = {"AUC_cls": binary.auc, "EER_cls": binary.eer, "ACC_cls": binary.accuracy}
    logits, labels = inputs["logits_multicls"], inputs["multi_label"]
    precision = average_precision(logits, labels == 1) / 100
    limits = {match[1] for name in case.wanted if (match := re.search(r"_k(\d+)$", name))}
    for suffix, top in (("", None), *((f"_k{limit}", int(limit)) for limit in limits)):
        kinds = multi_label_metrics(logits, labels, top)
        names = {"OP": kinds.op, "OR": kinds.or_, "OF1": kinds.of1, "CP": kinds.cp, "CR": kinds.cr, "CF1": kinds.cf1}
        out |= {f"{name}{suffix}": value for name, value in names.items()}
    out["F1_multicls_FS_FA_TS_TA"] = multi_label_metrics(logits, labels).class_f1
    out |= {"AP_per_class": precision, "MAP": precision.mean()}
    iou = grounding_iou(inputs["output_coord"], inputs["fake_image_box"])
    names = ("IOU_score", "IOU_ACC_50", "IOU_ACC_75", "IOU_ACC_95")
    out |= dict(zip(names, box_metrics(iou), strict=True))
    wanted = torch.where(inputs["token_label"] == case.config["token_ignore_index"], IGNORE_INDEX, inputs["token_label"])
    found = token_metrics(inputs["logits_tok"].argmax(-1), wanted)
    names = ("Precision_tok", "Recall_tok", "F1_tok", "ACC_tok")
    out |= dict(zip(names, found, strict=True))
    return {name: torch.as_tensor(value) for name, value in out.items()}


def text_alignment(case: Case) -> dict[str, Tensor]:
    config = case.config
    texts, positions, words = config["texts"], config["fake_text_pos"], config["max_words"]
    assert config["do_lower_case"], "the official tokeniser is uncased"
    assert [clean_caption(text, words) for text in texts] == config["captions"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.txt").write_text("\n".join(config["vocab"]) + "\n", encoding="utf-8")
        tokenizer = CaptionTokenizer(folder, words, config["max_length"], shifted_labels=True)
    found = tokenizer(texts, positions)
    marked = [(row == 1).nonzero().flatten().tolist() for row in found.labels]
    assert marked == config["fake_token_pos"]
    table = torch.full((len(texts), found.input_ids.shape[1] + 1), -2)
    for row, numbers in enumerate(found.words):
        table[row, : len(numbers) + 2] = torch.tensor([-1, *numbers, -1])
    word_mask = torch.zeros(len(texts), words)
    for row, numbers in enumerate(positions):
        word_mask[row, [number for number in numbers if number < words]] = 1
    return {
        "fake_word_mask": word_mask,
        "input_ids": found.input_ids,
        "attention_mask": found.mask,
        "token_label": found.labels,
        "word_ids_before_trim": table,
    }


def image_box_transform(case: Case) -> dict[str, Tensor]:
    config, out = case.config, {}
    for i, box in enumerate(config["fake_image_box"]):
        image = Image.fromarray(case.inputs[f"image{i}"].numpy())
        assert list(image.size) == config["sizes_wh"][i]
        for name, flip in (("eval", False), ("train_noflip", False), ("train_flip", True)):
            out[f"{name}_image{i}"] = image_tensor(image, config["image_res"], flip)
            out[f"{name}_box{i}"] = box_target(box, image.size, flip)
    for name in (name for name in case.wanted if name.startswith("aug_")):
        _, operation, *variant = name.split("_", 2)
        source = case.inputs["_".join(["image", *variant]) if variant else "image0"].numpy()
        pixels = apply_operation(operation, source, config["aug_level"] / MAX_LEVEL, True, True)
        out[name] = torch.from_numpy(np.array(pixels))
    return out


def schedule_and_pos_embed(case: Case) -> dict[str, Tensor]:
    config, out = case.config, {}
    optimizer, schedule = config["optimizer"], config["schedular"]
    image_lr = optimizer.get("lr_img")
    model = _model_with_names([name for group in config["param_groups"] for name in group["params"]])
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = hammer_groups(named, image_lr / optimizer["lr"] if image_lr else None)
    names = {id(p): name for name, p in named}
    rates = [optimizer["lr"] * group.get("lr_scale", 1.0) for group in groups]
    ours = [
        (sorted(names[id(p)] for p in group["params"]), group.get("weight_decay", optimizer["weight_decay"]))
        for group in groups
    ]
    theirs = [(sorted(group["params"]), group["weight_decay"]) for group in config["param_groups"]]
    columns = [ours.index(group) for group in theirs]  # raises where a group is not among ours
    np.testing.assert_allclose([rates[i] for i in columns], [group["lr"] for group in config["param_groups"]])
    assert schedule["sched"] == "cosine"
    length, epochs = config["iterations_epoch0"], config["epochs_recorded"]
    curves = [
        cosine_per_epoch(
            length * schedule["epochs"],
            length,
            rates[i],
            schedule["min_lr"],
            schedule["warmup_lr"],
            schedule["warmup_epochs"],
        )
        for i in columns
    ]
    for name, steps in (
        ("epoch0_per_iteration", range(length)),
        ("first_iteration_of_epoch", range(0, length * epochs, length)),
    ):
        values = [[rates[i] * curve(step) for i, curve in zip(columns, curves, strict=True)] for step in steps]
        out[f"lr_{name}"] = torch.tensor(values, dtype=torch.float64)
    out["pos_embed"] = resample_abs_pos_embed(case.inputs["pos_embed"], [config["new_grid"]] * 2, antialias=False)
    return out


def _model_with_names(names: list[str]) -> Hammer:
    """The smallest model with parameters of just these official names."""
    blocks = {int(match[1]) for name in names if (match := re.search(r"visual_encoder\.blocks\.(\d+)", name))}
    layers = {int(match[1]) for name in names if (match := re.search(r"encoder\.layer\.(\d+)\.attention", name))}
    fused = {int(match[1]) for name in names if (match := re.search(r"encoder\.layer\.(\d+)\.crossattention", name))}
    model = Hammer(
        image_size=4,
        patch_size=2,
        width=4,
        vision_layers=len(blocks),
        vision_heads=1,
        text_layers=len(layers),
        fusion_layer=min(fused),
        text_heads=1,
        text_intermediate=4,
        vocab_size=8,
        max_positions=4,
        grounding_heads=1,
        embed_dim=2,
        queue_size=4,
    )
    assert sorted(names) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    return model


RUNNERS = {
    "eval_forward": eval_forward,
    "train_forward": train_forward,
    "mac_loss": mac_loss,
    "bbox_losses": bbox_losses,
    "metrics": metrics,
    "text_alignment": text_alignment,
    "image_box_transform": image_box_transform,
    "schedule_and_pos_embed": schedule_and_pos_embed,
}
