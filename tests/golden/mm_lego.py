"""Runs our blocks, merges, fusions and survival objectives against MM-Lego's reference vectors."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mm_lego.block import LegoBlock
from models.mm_lego.checkpoint import block_from_official, pooling_from_official, snn_from_official
from models.mm_lego.fuse import LegoFuse
from models.mm_lego.heads import official_weights
from models.mm_lego.merge import LegoMerge
from models.mm_lego.metrics import auc, concordance, hard_binary_auc, macro_auc
from models.mm_lego.survival import class_weights, l1_penalty, risk, survival_bins, survival_curve, survival_nll
from tests.golden.harness import Case

HEADS = {"slerp": "slerp_official", "linear": "linear", "ot": "ot"}


def official_flags(flags: dict) -> dict:
    """Official arguments of a block as ours; its ``weight_sharing`` is inverted."""
    flags = dict(flags)
    shared = not flags.pop("weight_sharing", True)
    return {**flags, "share": "after_first" if shared else "none"}


def weights_of(case: Case, part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in case.weights.items() if name.startswith(f"{part}.")}


def as_stored(latent: Tensor) -> Tensor:
    return torch.view_as_real(latent) if latent.is_complex() else latent


def block(case: Case) -> dict[str, Tensor]:
    config, inputs, out = case.config, case.inputs, {}
    weights = weights_of(case, "block")
    for name, flags in config["variants"].items():
        model = block_from_official(weights, dim_head=config["dim_head"], **official_flags(flags)).eval()
        assert model.depth == config["depth"]
        latent = model.encode(inputs["x"])
        out |= {f"{name}.logits": model.head(latent), f"{name}.latent": latent.real}
        out[f"{name}.latent_complex"] = as_stored(latent)
    if "latent_override" in inputs:
        model = block_from_official(weights, dim_head=config["dim_head"]).eval()
        out["override.latent"] = model.encode(inputs["x"], model.transform(inputs["latent_override"])).real
    for name, kind in config.items():
        if name.startswith("enc_") and kind is not None:
            model, x = behind_encoder(case, name, kind["kind"]), inputs[f"{name}.x"]
            latent = model.encode(x)
            out |= {
                f"{name}.encoder_out": model.encoder(x),
                f"{name}.latent": latent.real,
                f"{name}.logits": model.head(latent),
            }
            out[f"{name}.latent_complex"] = as_stored(latent)
    return out


def behind_encoder(case: Case, part: str, kind: str) -> LegoBlock:
    weights = weights_of(case, part)
    encoder_weights = {n.removeprefix("encoder."): value for n, value in weights.items() if n.startswith("encoder.")}
    if kind == "snn":
        encoder: nn.Module = snn_from_official(encoder_weights)
    elif kind == "mil":
        encoder = pooling_from_official(encoder_weights, softmax_over="batch")
    else:
        assert kind == "seq"
        width, input_dim = encoder_weights["0.weight"].shape
        encoder = nn.Sequential(nn.Linear(input_dim, width), nn.ReLU(), nn.Linear(width, width))
        encoder.load_state_dict(encoder_weights)
    return block_from_official(weights, encoder, dim_head=case.config["dim_head"]).eval()


def blocks_and_inputs(case: Case) -> tuple[list[LegoBlock], list[Tensor]]:
    parts = range(len(case.config["shapes"]))
    blocks = [block_from_official(weights_of(case, f"block{m}")).eval() for m in parts]
    assert all(block.depth == case.config["depth"] for block in blocks)
    return blocks, [case.inputs[f"x{m}"] for m in parts]


def official_heads(method: str, alpha: float) -> dict:
    weights = official_weights(HEADS[method], alpha)
    return {"head_method": HEADS[method], "head_weights": weights, "heads_of": "first_two"}


def merge(case: Case) -> dict[str, Tensor]:
    blocks, inputs = blocks_and_inputs(case)
    out = {f"latent_complex{m}": as_stored(block.encode(x)) for m, (block, x) in enumerate(zip(blocks, inputs, strict=True))}
    for name in case.config["cases"]:
        count, method, alpha = re.fullmatch(r"(\d+)blocks\.(\w+)\.alpha([\d.]+)", name).groups()
        model = official_merge(blocks[: int(count)], method, case.config["default_head"], float(alpha))
        latent = model.encode(inputs[: int(count)])
        out |= {f"{name}.latent_complex": as_stored(latent), f"{name}.logits": model.head(latent)}
    for name in sorted({match[1] for name in case.wanted if (match := re.match(r"(head\.\w+\.alpha[\d.]+)\.", name))}):
        _, method, alpha = name.split(".", 2)
        model = official_merge(blocks[:2], "harmonic", method, float(alpha.removeprefix("alpha")))
        out[f"{name}.logits"] = model(inputs[:2])
        for layer, official in ((model.head.norm, 1), (model.head.linear, 2)):
            out |= {f"{name}.combined_layers.{official}.{part}": value for part, value in layer.named_parameters()}
    return out


def official_merge(blocks: list[LegoBlock], method: str, head: str, alpha: float) -> LegoMerge:
    harmonic = {"weights": (alpha, 1 - alpha), "phase": "arithmetic", "official_constant": True} if method == "harmonic" else {}
    return LegoMerge(blocks, method, **harmonic, **official_heads(head, alpha))


def fuse(case: Case) -> dict[str, Tensor]:
    config, out = case.config, {}
    blocks, inputs = blocks_and_inputs(case)
    head, alpha = re.fullmatch(r"(\w+), alpha ([\d.]+)", config["head"]).groups()
    heads = official_heads(head, float(alpha))
    for name in sorted({name.rpartition(".")[0] for name in case.wanted if not name.startswith("grad.")}):
        count, method = name.split(".")
        model = LegoFuse(blocks[: int(count)], method, depth=config["weave_depth"], carry="real", **heads)
        if model.latent is not None:
            model.latent.data.copy_(case.weights["fuse.L"])
        latent = model.encode(inputs[: int(count)])
        out |= {f"{name}.latent": latent.real, f"{name}.logits": model.head(latent)}
    leaves = [x.clone().requires_grad_() for x in inputs]
    LegoFuse(blocks, "stack", carry="real", **heads)(leaves).square().sum().backward()
    out |= {f"grad.x{m}": leaf.grad for m, leaf in enumerate(leaves)}
    return out | {"grad.block0_latent": blocks[0].latent.grad}


def survival(case: Case) -> dict[str, Tensor | float]:
    config, inputs = case.config, case.inputs
    logits, bins, censored = inputs["logits"], inputs["y_disc"], inputs["censorship"]
    out: dict[str, Tensor | float] = {"hazards": logits.sigmoid(), "survival": survival_curve(logits), "risk": risk(logits)}
    weights = inputs["class_weights"]
    if config["class_weights"] is not None:
        torch.testing.assert_close(class_weights(bins, config["num_classes"], config["class_weights"]), weights)
    for name in sorted({match[1] for name in case.wanted if (match := re.match(r"nll\.(.+)\.value", name))}):
        alpha = {"alpha": float(match[1])} if (match := re.search(r"alpha([\d.]+)", name)) else {}
        leaf = logits.clone().requires_grad_()
        loss = survival_nll(leaf, bins, censored, class_weights=weights if "weighted" in name else None, **alpha)
        loss.backward()
        out |= {f"nll.{name}.value": loss, f"nll.{name}.grad_logits": leaf.grad}
    for name, risks in (("risk", risk(logits)), ("ties", inputs["risk_with_ties"])):
        result = concordance(risks, inputs["event_time"], censored)
        out |= {f"cindex.{name}": result.c_index, f"cindex.{name}.counts": torch.tensor(result[1:])}
    binary, labels = inputs["binary_logits"], inputs["binary_labels"]
    out["auc.binary_hard"] = hard_binary_auc(binary, labels)
    out["auc.binary_scores"] = auc(binary[:, 1] - binary[:, 0], labels == 1)
    out["auc.multiclass_ovr_macro"] = macro_auc(logits, bins)
    out["cross_entropy_weighted"] = F.cross_entropy(logits, bins, weights)
    out["bins.y_disc"] = survival_bins(inputs["bins.survival_months"], inputs["bins.censorship"], config["n_bins"])[0]
    for name in (name for name in case.wanted if name.startswith("l1_")):
        out[name] = float(name.removeprefix("l1_")) * l1_penalty(weights_of(case, "l1_model").values())
    return out


RUNNERS = {"block": block, "merge": merge, "fuse": fuse, "survival": survival}
