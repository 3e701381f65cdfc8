"""Runs our ARL against the reference vectors of the official code."""

from __future__ import annotations

import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.tokenizers.mlm import mask_budget, mask_groups, take_groups
from models.arl import objectives as knowledge_objectives
from models.arl.checkpoint import model_from_official, own_name
from models.arl.entities import continuations, place_entities, token_spans
from models.arl.graph import NO_ENTITY
from models.arl.masked_image import sincos_positions
from models.arl.model import ARL
from models.arl.parameter_groups import arl_groups
from models.metrics.answers import answer_metrics
from models.metrics.video_retrieval import any_hit_recall
from models.optim.schedules import warmup_linear
from models.two_tower import objectives
from models.two_tower.answers import normalise_answer
from models.two_tower.checkpoint import resize_positions
from models.two_tower.model import Encoded
from tests.golden.harness import Case


def fusion(case: Case) -> dict[str, Tensor]:
    model, inputs = build(case), case.inputs
    calls: dict[nn.Module, tuple] = {}
    first, last = model.cross_modal_text_layers[0], model.cross_modal_text_layers[-1]
    watched = (first.attention, first.crossattention, last.knowledge_crossattention)
    for part in watched:
        part.register_forward_pre_hook(lambda module, args: calls.__setitem__(module, args))
    text, image, encoded = encode(model, inputs)
    fused = model.fuse(text, image)
    attention = [part.weights(*calls[part]) for part in watched]
    names = ("text_self_attention_layer0", "text_to_image_attention_layer0", "knowledge_to_image_attention_last")
    # Reading less, trimming, and leaving out the entities where there are none, give the same.
    trimmed = encode(model, inputs, trim=True)[0]
    torch.testing.assert_close(model.fuse(trimmed, image, read="first").pooled, fused.pooled, rtol=1e-4, atol=1e-5)
    if bool((inputs["text_ent_ids"] == NO_ENTITY).all()):
        plain = model(inputs["text_ids"], inputs["text_masks"], inputs["image"])
        torch.testing.assert_close(plain.pooled, fused.pooled, rtol=1e-4, atol=1e-5)
    return {
        **dict(zip(names, attention, strict=True)),
        "uni_modal_text_cls": text.experts[-1][:, 0],
        "uni_modal_image_cls": image.experts[-1][:, 0],
        "gnn_entity_embeddings": encoded,
        "entity_feats": text.entities,
        "multi_modal_text_feats": fused.text,
        "multi_modal_image_feats": fused.image,
        "multi_modal_cls_feats": fused.pooled,
    }


def pretrain_losses(case: Case) -> dict[str, Tensor]:
    model, inputs, config = build(case), case.inputs, case.config
    text, image, encoded = encode(model, inputs)
    masked = encode(model, inputs, suffix="_mlm")[0]
    labels = inputs["text_labels_mlm"]
    mlm_loss, chosen = objectives.masked_language(model, masked, image, labels)
    mlm_logits = model.mlm_score(model.fuse(masked, image).text)
    torch.testing.assert_close(chosen, mlm_logits[labels != -100], rtol=1e-4, atol=1e-5)
    levels = None if config["mim_layer"] == -1 else config["mim_layer"]
    settings = {"share": config["mim_prob"], "levels": levels, "normalise": config["norm_pix"]}
    restored = knowledge_objectives.masked_image(model, text, inputs["image"], inputs["mim_noise"], **settings)
    matched = inputs["itm_labels"].long()
    false = model.encode_image(inputs["false_image_0"][matched == 0])
    itm_loss, itm_logits = objectives.matching(model, text, objectives.with_false_images(image, false, matched), matched)
    aligned = knowledge_objectives.align(model, text, image, encoded, inputs["txt_labels"], inputs["img_labels"])
    return {
        "mlm_loss": mlm_loss, "mlm_logits": mlm_logits, "mim_loss": restored.loss, "mim_logits": restored.logits,
        "mim_labels": restored.labels, "mim_masks": restored.removed, "mim_ids_restore": restored.restore,
        "itm_loss": itm_loss, "itm_logits": itm_logits, "align_loss": aligned.loss, "img_align_logits": aligned.image,
        "txt_align_logits": aligned.text, "total_loss_itm0p1": mlm_loss + restored.loss + 0.1 * itm_loss + aligned.loss,
    }  # fmt: skip


def downstream(case: Case) -> dict[str, Tensor | float]:
    model, inputs = build(case), case.inputs
    text, image, _ = encode(model, inputs)
    out: dict[str, Tensor | float] = {"multi_modal_cls_feats": model.fuse(text, image).pooled}
    if "answer" in model.tasks:
        logits = objectives.answer_logits(model, text, image)
        targets = F.one_hot(inputs["vqa_labels"], logits.shape[1]).float()
        out |= {"vqa_logits": logits, "vqa_targets": targets, "vqa_loss": objectives.answer_loss(logits, targets)}
    if "classify" in model.tasks:
        logits = knowledge_objectives.class_logits(model, text, image)
        out |= {"cls_logits": logits, "cls_loss": F.cross_entropy(logits, inputs["cls_labels"])}
    out["irtr_score"] = objectives.rank_scores(model, text, image)[:, 0]
    if "metric_logits" in inputs:
        predicted = inputs["metric_logits"].argmax(dim=1)
        score = (predicted == inputs["metric_targets"]).float()
        metrics = answer_metrics({"answer_predicted": predicted, "answer_score": score, "answer_open": inputs["metric_types"]})
        out |= {
            f"metric_{name}": metrics[f"answer/{key}"] / 100
            for name, key in (("overall", "score"), ("closed", "closed_score"), ("open", "open_score"))
        }
    if "retrieval_scores" in inputs:
        scores = inputs["retrieval_scores"]
        right = inputs["retrieval_image_ids"][:, None] == inputs["retrieval_text_image_ids"]
        for way, of_way, of_pair in (("tr", scores, right), ("ir", scores.T, right.T)):
            out |= {f"{way}_r{k}": any_hit_recall(of_way, of_pair, k) for k in (1, 5, 10)}
    return out


def data_and_schedule(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, {name: value.numpy() for name, value in case.inputs.items()}
    for answer, normal in config["normalize_word_pairs"]:
        assert normalise_answer(answer) == normal, answer
    length, count = config["text_len"], config["max_ents"]
    entities = token_spans(inputs["char_entities"], inputs["token_offsets"])
    placed = place_entities(entities, length, count)
    guarded = place_entities(entities, length, count, inputs["mlm_labels"])
    together = continuations(entities, length)
    places = np.arange(length)
    groups = mask_groups((places > 0) & (places < inputs["num_real_tokens"]), together)
    random.Random(config["python_random_seed_for_whole_entity_mask"]).shuffle(groups)
    masked = np.isin(places, take_groups(groups, mask_budget(length)))
    multiplier = warmup_linear(config["max_steps"], config["max_steps"], config["lr"])
    steps = len(case.inputs.get("steps", range(config["max_steps"] + 2)))
    out = {
        "ent_ids": placed.ids, "ent_masks": placed.ids != NO_ENTITY, "pos_matrix": placed.cover,
        "ent_ids_mlm": guarded.ids, "ent_masks_mlm": guarded.ids != NO_ENTITY, "pos_matrix_mlm": guarded.cover,
        "txt_label_ids": np.array([number for _, _, number in entities], dtype=np.int64),
        "ent_ref": together, "whole_entity_mask": masked,
        "lr_per_step": np.array([config["lr"] * multiplier(step) for step in range(steps)]),
    }  # fmt: skip
    tensors = {name: torch.from_numpy(value) for name, value in out.items()}
    tensors["positional_embedding_resized"] = resize_positions(case.inputs["positional_embedding"], config["grid1"])
    tensors["sincos_2d"] = sincos_positions(config["grid1"], config["sincos_dim"])
    return {name: value.to(torch.uint8) if value.dtype == torch.bool else value for name, value in tensors.items()}


def optim_groups(case: Case) -> dict[str, Tensor]:
    config = case.config["official_config"]
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in case.config["parameter_names"]}
    groups = arl_groups(
        [(own_name(name), parameter) for name, parameter in parameters.items()],
        config["lr_multiplier_head"],
        config["lr_multiplier_multi_modal"],
        pretrain="pretrain" in config["exp_name"],
    )
    decay = config["weight_decay"]
    settings = {p: (group["lr_scale"], group.get("weight_decay", decay)) for group in groups for p in group["params"]}
    assert case.config["in_no_group"] == [] and len(settings) == len(parameters)
    rows = torch.tensor([settings[parameter] for parameter in parameters.values()])
    return {"lr_multiplier": rows[:, 0], "weight_decay": rows[:, 1]}


def build(case: Case) -> ARL:
    """The model of a file, all of whose sizes but the numbers of heads come from its weights, checked against the config."""
    config = case.config
    model = model_from_official(
        case.weights,
        heads=config["heads"],
        image_heads=config["vis_heads"],
        text_heads=config["text_heads"],
        knowledge_heads=config["know_heads"],
        **({"mim_heads": config["dec_heads"]} if any(name.startswith("mim_head.") for name in case.weights) else {}),
        entity_source="table" if config["ent_embedding_only"] else "graph",
        tasks=tasks_of(case),
    )
    assert (model.width, model.levels) == (config["hidden"], config["top_layers"])
    assert len(model.vit_model.visual.transformer.resblocks) == config["vis_layers"] - 1
    assert model.align_head.x.shape == (config["entities"], config["know_hidden"])
    assert model.align_head.edge_index.shape[1] == config["triples"]
    return model.eval()


def tasks_of(case: Case) -> tuple[str, ...]:
    """The heads in the file, and for downstream files the ranking head, which the file's model takes from the matching head."""
    heads = {
        "mlm_head": "mlm", "mim_head": "mim", "itm_head": "match", "vqa_head": "answer", "cls_head": "classify",
        "align_head.img_linear1": "align",
    }  # fmt: skip
    tasks = [task for head, task in heads.items() if any(name.startswith(f"{head}.") for name in case.weights)]
    return (*tasks, *(["rank"] if "irtr_score" in case.wanted else []))


def encode(model: ARL, inputs: dict[str, Tensor], suffix: str = "", trim: bool = False) -> tuple[Encoded, Encoded, Tensor]:
    """The text with its entities, the image, and all entities of the graph."""
    encoded = model.encode_entities()
    text = model.encode_text(inputs[f"text_ids{suffix}"], inputs["text_masks"], trim)
    entities = inputs[f"text_ent_ids{suffix}"], inputs[f"text_pos_matrices{suffix}"]
    return model.with_entities(text, *entities, encoded), model.encode_image(inputs["image"]), encoded


RUNNERS = {
    "fusion": fusion,
    "pretrain_losses": pretrain_losses,
    "downstream": downstream,
    "data_and_schedule": data_and_schedule,
    "optim_groups": optim_groups,
}
