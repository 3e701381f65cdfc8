"""Runs the reference files of DINOv2 and RAD-DINO through our implementation and importers."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.encoders.preprocess import ImagePreprocess
from models.metrics.dice import dice_per_class, dice_per_image
from models.metrics.multi_label import auroc, tied_average_precision
from models.rad_dino.backbone import Block, DinoViT
from models.rad_dino.checkpoint import backbone_weights, flat_name, load_backbone, load_official, sizes
from models.rad_dino.head import DinoHead
from models.rad_dino.losses import CentredTargets, koleo, prototype_loss, sinkhorn_knopp
from models.rad_dino.masking import BlockMasks, batch_masks, described, official_most_cells
from models.rad_dino.model import StudentAndTeacher
from models.rad_dino.parameter_groups import rule_of
from models.rad_dino.preprocess import released_preprocess
from models.rad_dino.schedules import cosine, dino_cosine, peak_rate, teacher_temperature
from models.rad_dino.segmentation import LinearSegmentation
from tests.golden.harness import Case


def backbone(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    shapes = sizes(backbone_weights(case.weights))
    positions = {"position_offset": config["offset"], "position_antialias": config["antialias"]}
    model = DinoViT(**{**shapes, "heads": config["heads"], **positions}).eval()
    load_backbone(model, case.weights)
    expected = {"image_size": config["img_size"], "dim": config["dim"], "depth": config["depth"]}
    assert {name: shapes[name] for name in expected} == expected and shapes["registers"] == config["registers"]
    with torch.no_grad():
        native, alt = model(inputs["image_native"]), model(inputs["image_alt"])
        masked = model(inputs["image_alt"], inputs["masks_alt"].bool())
        height, width = config["alt_hw"]
        out = {
            "native_clstoken": native.cls,
            "native_patchtokens": native.patches,
            "native_regtokens": native.registers,
            "alt_clstoken": alt.cls,
            "alt_patchtokens": alt.patches,
            "alt_masked_clstoken": masked.cls,
            "alt_masked_patchtokens": masked.patches,
            "alt_masked_prenorm": masked.prenorm,
            "pos_embed_alt": model.positions(height, width),
        }
        grid = height // model.patch_size, width // model.patch_size
        for index, output in enumerate(model.intermediate(inputs["image_alt"], config["n_last"])):
            out[f"intermediate_{index}_cls"] = output.cls
            out[f"intermediate_{index}_map"] = output.patches.transpose(1, 2).unflatten(2, grid)
    return out


def dino_head(case: Case) -> dict[str, Tensor]:
    config = case.config
    head = DinoHead(config["in"], config["out"], config["hid"], config["bott"], config["nlayers"])
    head.load_state_dict(case.weights)
    x = case.inputs["x"].requires_grad_()
    logits = head(x)
    (logits * case.inputs["grad_output"]).sum().backward()
    return {
        "logits": logits.detach(),
        "bottleneck": head.mlp(x).detach(),
        "grad_x": x.grad,
        "grad_weight_v": head.last_layer.weight_v.grad,
        "grad_weight_g": head.last_layer.weight_g.grad,
    }


def losses(case: Case) -> dict[str, Tensor]:
    config, inputs, temperature = case.config, case.inputs, case.config["teacher_temp"]
    masks = described(inputs["masks"].bool())
    cls = sinkhorn_knopp(inputs["teacher_cls_1"], temperature)
    patch = sinkhorn_knopp(inputs["teacher_patch_masked"], temperature)
    # Logits are given: with unit vectors for prototypes they are their own products.
    prototypes, both = torch.eye(config["K"]), sum(cls.chunk(2))

    def mean_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        return prototype_loss(logits, prototypes, targets, torch.full((len(logits),), 1 / len(logits)))

    patch_weights = masks.weights / len(masks.crops)
    centring, patch_centring = CentredTargets((1, config["K"])), CentredTargets((1, 1, config["K"]))
    out = {
        "sinkhorn_cls": cls,
        "sinkhorn_patch": patch,
        "masks_weight": masks.weights,
        "dino_local_sum": sum(mean_entropy(crop, both) for crop in inputs["student_local"]),
        "dino_global": mean_entropy(inputs["student_global"], cls),
        "ibot_loss": prototype_loss(inputs["student_patch_masked"], prototypes, patch, patch_weights),
        "ibot_centered": patch_centring(inputs["teacher_patch_masked"], temperature),
        "ibot_center_after": patch_centring.center,
    }
    for call in (1, 2):
        out[f"centered_{call}"] = centring(inputs[f"teacher_cls_{call}"], temperature)
        out[f"center_after_{call}"] = centring.center.clone()
    x = inputs["koleo_x"].requires_grad_()
    loss = koleo(x)
    loss.backward()
    return out | {"koleo_loss": loss.detach(), "koleo_grad": x.grad}


def _student_and_teacher(config: dict[str, Any], **encoder: Any) -> StudentAndTeacher:
    def head(prototypes: int) -> Any:
        return lambda width: DinoHead(width, prototypes, config["hid"], config["bott"])

    def build() -> DinoViT:
        arguments = {name: config[name] for name in ("dim", "depth", "heads", "init_values")}
        return DinoViT(**{**arguments, "image_size": config["gsize"], "patch_size": config["patch"], **encoder})

    separate = head(config["K2"]) if config["separate"] else None
    return StudentAndTeacher(build, head(config["K"]), separate, config["centering"])


def ssl_step(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    shapes = sizes(backbone_weights(case.weights))
    model = _student_and_teacher(config, **{name: shapes[name] for name in ("ffn", "registers", "mlp_ratio")})
    load_official(model, case.weights)
    masks = inputs["collated_masks"].bool()
    indices, weights = inputs["mask_indices_list"], inputs["masks_weight"]
    ours = described(masks)
    assert torch.equal(ours.indices, indices) and torch.allclose(ours.weights, weights)
    crops = inputs["collated_global_crops"], inputs.get("collated_local_crops")
    terms = model.losses(*crops, masks, indices, weights, config["teacher_temp"])
    koleo_term = config["koleo_w"] * terms["koleo"]
    local = terms.get("dino_local", torch.tensor(0.0))
    total = local + terms["dino_global"] + koleo_term + terms["ibot"]
    total.backward()
    parts = dict(model.student.items())
    student = model.student["backbone"]
    out = {
        "dino_local_crops_loss": local.detach(),
        "dino_global_crops_loss": terms["dino_global"].detach(),
        "koleo_loss": koleo_term.detach() / 2,
        "ibot_loss": terms["ibot"].detach() / 2,
        "total_loss": total.detach(),
        "grad_cls_token": student.cls_token.grad,
        "grad_mask_token": student.mask_token.grad,
        "dino_center_after": model.dino_loss.center,
        "ibot_center_after": model.ibot_patch_loss.center,
    }
    for name, part in parts.items():
        out[f"grad_norm_{name}"] = _gradient_norm(part)
    model.update_teacher(config["momentum"])
    return out | {"ema_qkv_weight_block0": model.teacher["backbone"].blocks[0].attn.qkv.weight}


def _gradient_norm(module: nn.Module) -> Tensor:
    return torch.stack([p.grad.double().norm() for p in module.parameters() if p.grad is not None]).norm()


def block_masks(case: Case) -> dict[str, Tensor]:
    config = case.config
    side = config["size"] // config["patch"]
    most = official_most_cells(config["size"], config["patch"])
    generator, rng = BlockMasks((side, side), most), random.Random(config["seed"])
    examples = [generator(int(target), rng) for target in config["targets"]]
    ratio = tuple(config["ratio"])
    batch = batch_masks(2 * config["B"], generator, random.Random(config["seed"]), config["prob"], ratio)
    return {
        "example_masks": torch.stack(examples).to(torch.uint8),
        "collated_masks": batch.crops.to(torch.uint8),
        "mask_indices_list": batch.indices,
        "masks_weight": batch.weights,
        "max_num_patches": torch.tensor(float(most)),
        "n_masked_patches": torch.tensor([len(batch.indices)]),
        "upperbound": torch.tensor(batch.upper_bound),
    }


def schedules_and_groups(case: Case) -> dict[str, Tensor]:
    config, length = case.config, case.config["epoch_length"]
    total, steps = config["epochs"] * length, case.inputs["steps"].tolist()
    peak = peak_rate(config["base_lr"], config["global_batch"])
    multiplier = dino_cosine(total, length, peak, config["min_lr"], config["warmup_epochs"])
    rates = [peak * multiplier(step) for step in steps]
    frozen = config["freeze_epochs"] * length
    groups = config["groups_model"]
    model = _student_and_teacher(groups, **({"ffn": "swiglu"} if "swiglu" in groups.get("ffn", "mlp") else {}))
    names = [flat_name(name) for name in config["parameter_names"]]
    assert sorted(names) == sorted(name for name, _ in model.student.named_parameters())
    rules = [rule_of(name, groups["depth"], groups["lwd"], groups["pe_mult"]) for name in names]
    warm = config["tt_warm_epochs"] * length
    table = {
        "lr": rates,
        "last_layer_lr": [0.0 if step < frozen else rate for step, rate in zip(steps, rates, strict=True)],
        "weight_decay": [cosine(step, config["wd"], config["wd_end"], total) for step in steps],
        "momentum": [cosine(step, config["mom"], config["mom_end"], total) for step in steps],
        "teacher_temp": [teacher_temperature(step, config["tt"], config["tt_start"], warm) for step in steps],
        "peak_lr": peak,
        "group_lr_multiplier": [rule.lr_scale for rule in rules],
    }
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in table.items()} | {
        "group_wd_multiplier": torch.tensor([rule.decay_scale for rule in rules]),
        "group_is_last_layer": torch.tensor([int(rule.last_layer) for rule in rules]),
    }


def stochastic_depth(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    swiglu = "mlp.w12.weight" in case.weights
    block = Block(config["dim"], config["heads"], ffn="swiglu" if swiglu else "mlp", drop_path=config["rate"]).train()
    block.load_state_dict(case.weights)
    orders = [inputs[f"perm_{branch}_{group}"] for branch in ("attn", "ffn") for group in ("x", "y")]
    with torch.no_grad():
        x, y = block.forward_crops([inputs["x"], inputs["y"]], orders)
    return {"x": x, "y": y}


def released_layout(case: Case) -> dict[str, Tensor]:
    config = case.config
    model = DinoViT(**{**sizes(backbone_weights(case.weights)), "heads": config["heads"]}).eval()
    load_backbone(model, case.weights)
    with torch.no_grad():
        output = model(case.inputs["pixel_values"])
    preprocess: ImagePreprocess = released_preprocess(config["img_size"])
    pixels = preprocess(Image.fromarray(np.asarray(case.inputs["raw_gray_image"])))
    hidden = torch.cat([output.cls[:, None], output.registers, output.patches], dim=1)
    return {"last_hidden_state": hidden, "pooler_output": output.cls, "preprocessed": pixels}


def eval_metrics(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    scores, positives = inputs["scores"], inputs["labels"].bool()
    precision, area = tied_average_precision(scores, positives), auroc(scores, positives)
    per_image = dice_per_image(inputs["seg_pred"], inputs["seg_target"], config["classes"])
    per_class = dice_per_class(per_image)
    head = LinearSegmentation(config["dim"], config["classes"]).eval()
    head.load_state_dict(case.weights, strict=False)
    with torch.no_grad():
        logits = head(inputs["patch_map"], (config["up"], config["up"]))
    return {
        "auprc": precision.float(),
        "auroc": area.float(),
        "macro_auprc": precision.nanmean().float(),
        "dice_per_image_class": per_image,
        "dice_per_class": per_class,
        "macro_dice_foreground": per_class[1:].nanmean(),
        "seg_logits_upsampled": logits,
    }


RUNNERS = {
    "backbone": backbone,
    "dino_head": dino_head,
    "losses": losses,
    "ssl_step": ssl_step,
    "block_masks": block_masks,
    "schedules_and_groups": schedules_and_groups,
    "stochastic_depth": stochastic_depth,
    "released_layout": released_layout,
    "eval_metrics": eval_metrics,
}
