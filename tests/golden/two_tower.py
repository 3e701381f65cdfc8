"""Runs our two-tower models against the reference vectors of BridgeTower and ManagerTower: one set of runners for both."""

from __future__ import annotations

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BridgeTowerConfig, Qwen2Config, Qwen2ForCausalLM

from models.metrics.answers import percent
from models.optim.schedules import warmup_linear
from models.two_tower import objectives
from models.two_tower.answers import normalise_answer, score_of
from models.two_tower.checkpoint import model_from_official, resize_positions
from models.two_tower.managers import AdaptiveManager, Managers, StaticManager, normalised
from models.two_tower.model import TwoTower
from models.two_tower.parameter_groups import group_of
from models.two_tower.port import model_from_port, port_contrast
from models.two_tower.retrieval import recalls, rerank
from models.two_tower.visual_stream import AdaptiveStreamManager, StaticStreamManager, StreamManagers
from tests.golden.harness import Case

CONNECTORS = {"METER": "NoConnector", "BT": "Bridge", "MT": "Managers"}


def forward(case: Case) -> dict[str, Tensor]:
    model, inputs = build(case), case.inputs
    seen: dict[str, Tensor] = {}
    for side in ("text", "image"):
        layer = getattr(model, f"cross_modal_{side}_layers")[0]
        layer.output.register_forward_hook(partial(_keep_first, seen, f"cross_{side}_layer0"))
    text_states, image_states = (watch(model, side) for side in ("text", "image"))
    fused = model(inputs["text_ids"], inputs["text_masks"], inputs["image"])
    first = model.fuse(
        model.encode_text(inputs["text_ids"], inputs["text_masks"]), model.encode_image(inputs["image"]), read="first"
    )
    torch.testing.assert_close(first.pooled, fused.pooled, rtol=1e-4, atol=1e-5)
    return {
        **seen,
        "text_feats": fused.text,
        "image_feats": fused.image,
        "cls_feats": fused.pooled,
        "text_unimodal_projected": torch.stack(text_states),
        "image_unimodal_projected": torch.stack(image_states),
    }


def _keep_first(seen: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    seen.setdefault(name, output)


def watch(model: TwoTower, side: str) -> list[Tensor]:
    """The projected states of the first pass, without type embedding, filled by a wrapper of the projection."""
    states: list[Tensor] = []
    project = model._project

    def projected(of: str, layers: list[Tensor], kind: int) -> list[Tensor]:
        out = project(of, layers, kind)
        if of == side and not states:
            states.extend(x - model.token_type_embeddings.weight[kind] for x in out)
        return out

    model._project = projected
    return states


def pretrain(case: Case) -> dict[str, Tensor]:
    out = forward(case)
    model, inputs = build(case), case.inputs
    text = model.encode_text(inputs["text_ids_mlm"], inputs["text_masks"], trim=False)
    image = model.encode_image(inputs["image"])
    loss, chosen = objectives.masked_language(model, text, image, inputs["text_labels_mlm"])
    logits = model.mlm_score(model.fuse(text, image).text)
    torch.testing.assert_close(chosen, logits[inputs["text_labels_mlm"] != -100], rtol=1e-4, atol=1e-5)
    matched = inputs["itm_labels"]
    false = model.encode_image(inputs["false_image_0"][matched == 0])
    texts = model.encode_text(inputs["text_ids"], inputs["text_masks"])
    itm_loss, itm_logits = objectives.matching(model, texts, objectives.with_false_images(image, false, matched), matched)
    return out | {"mlm_logits": logits, "mlm_loss": loss, "itm_logits": itm_logits, "itm_loss": itm_loss}


def itc_hard_negatives(case: Case) -> dict[str, Tensor]:
    model, inputs = build(case), case.inputs
    text, image = model.encode_text(inputs["text_ids"], inputs["text_masks"]), model.encode_image(inputs["image"])
    contrast = objectives.contrastive(model, text, image, None if case.config["pretrain"] else inputs["img_index"])
    to_image, to_text = objectives.negative_weights(contrast)
    loss, logits = objectives.hard_matching(model, text, image, inputs["neg_image_idx"], inputs["neg_text_idx"])
    return {
        "unimodal_feats_text": contrast.text, "unimodal_feats_image": contrast.image, "itc_loss": contrast.loss,
        "weights_t2i": to_image, "weights_i2t": to_text, "itm_logits": logits, "itm_loss": loss,
    }  # fmt: skip


def downstream(case: Case) -> dict[str, Tensor]:
    model, inputs = build(case), case.inputs
    text, image = model.encode_text(inputs["text_ids"], inputs["text_masks"]), model.encode_image(inputs["image"])
    out = {}
    if hasattr(model, "vqa_classifier"):
        logits, targets = objectives.answer_logits(model, text, image), inputs["vqa_targets"]
        out |= {"vqa_logits": logits, "vqa_loss": objectives.answer_loss(logits, targets)}
        out["vqa_score"] = _score(logits, targets)
    if hasattr(model, "snli_classifier"):
        logits = objectives.entailment_logits(model, text, image)
        out |= {"snli_logits": logits, "snli_loss": F.cross_entropy(logits, inputs["snli_labels"])}
    if hasattr(model, "nlvr2_classifier"):
        logits = objectives.pair_logits(model, text, image, model.encode_image(inputs["image_1"], kind=2))
        out |= {"nlvr2_logits": logits, "nlvr2_loss": F.cross_entropy(logits, inputs["nlvr2_labels"])}
    return out


def retrieval_rerank(case: Case) -> dict[str, Tensor | float]:
    model, inputs = build(case), case.inputs
    texts, images = model.encode_text(inputs["text_ids"], inputs["text_masks"]), model.encode_image(inputs["images"])
    result = rerank(model, texts, images, case.config["k_test"], batch_size=7)
    metrics = {name: value / 100 for name, value in recalls(result.scores, inputs["text_img_index"]).items()}
    out: dict[str, Tensor | float] = {"i2t_rerank_scores": result.of_images, "t2i_rerank_scores": result.of_texts}
    means = []
    for short, long in (("tr", "i2t"), ("ir", "t2i")):
        of_k = [metrics[f"{long}_recall@{k}"] for k in (1, 5, 10)]
        out |= {f"{short}_r{k}": value for k, value in zip((1, 5, 10), of_k, strict=True)}
        means.append(sum(of_k) / 3)
        out[f"{short}_mean"] = means[-1]
    return out | {"r_mean": sum(means) / 2}


def hf_port(case: Case) -> dict[str, Tensor]:
    config, inputs = dict(case.config), case.inputs
    heads = {"image_heads": config.pop("vision_heads")} if "vision_heads" in config else {}
    model = model_from_port(case.weights, BridgeTowerConfig(**config), **heads).eval()
    fused = model(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"])
    out = {"text_features": fused.text, "image_features": fused.image, "pooler_output": fused.pooled}
    if hasattr(model, "itc_cross_modal_head"):
        contrast = port_contrast(model, inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"])
        out |= {"text_embeds": contrast.text, "image_embeds": contrast.image}
        out |= {"cross_embeds": contrast.cross, "itc_loss": contrast.loss}
    if hasattr(model, "itm_score"):
        logits = model.itm_score.fc(fused.pooled)
        out |= {"itm_logits": logits, "itm_loss": F.cross_entropy(logits, inputs["itm_labels"])}
    if hasattr(model, "mlm_score"):
        logits = model.mlm_score(fused.text)
        out |= {"mlm_logits": logits, "mlm_loss": F.cross_entropy(logits.flatten(0, 1), inputs["mlm_labels"].flatten())}
    return out


def utilities(case: Case) -> dict[str, Tensor | float]:
    config, inputs = case.config, case.inputs
    words = config["normalize_word"]
    assert [normalise_answer(word) for word in words["inputs"]] == words["outputs"]
    out: dict[str, Tensor | float] = {
        f"pos_embed_{i}": resize_positions(inputs[f"pos_embed_{i}"], to) for i, (_, to) in enumerate(config["pos_embed_grids"])
    }
    targets = inputs["vqa_answer_counts"].clone().apply_(lambda count: round(10 * score_of(int(count)))) / 10
    out |= {"vqa_targets": targets, "vqa_score": _score(inputs["vqa_logits"], targets)}
    out["vqa_bce_loss"] = objectives.answer_loss(inputs["vqa_logits"], targets)
    known = inputs["acc_labels"] != -100
    out["accuracy"] = percent(inputs["acc_logits"].argmax(1)[known] == inputs["acc_labels"][known]) / 100
    rates = {"base": 1.0, "head": _scale(config, "lr_mult_head"), "cross": _scale(config, "lr_mult_cross_modal")}
    managed = config["model"]["model_type"] == "MT"
    for name, (rate, decay) in config["param_groups"].items():
        part, decays = group_of(name, "cross" if managed else "head")
        ours = [rates[part] * config["learning_rate"], config["weight_decay"] if decays else 0.0]
        torch.testing.assert_close(torch.tensor(ours), torch.tensor([rate, decay]), msg=name)
    multiplier = warmup_linear(
        config["max_steps"],
        config["max_steps"],
        config["learning_rate"],
        config["warmup_steps"],
        config["decay_power"],
        config["end_lr"] / config["learning_rate"],
    )
    steps = torch.tensor([multiplier(step) for step in range(config["max_steps"] + 1)], dtype=torch.float64)
    per_group = [config["learning_rate"] * rate for rate in rates.values() for _ in range(2)]
    return out | {"lr_per_group": steps[:, None] * torch.tensor(per_group, dtype=torch.float64)}


def manager_modules(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    width, count = config["hidden_size"], config["num_experts"]
    shared = {"weight_type": config["manager_weight_type"], "temperature": config["manager_softmax_temperature"]}
    modules = {
        "saue_first": StaticManager(width, count, 0, **shared),
        "saue": StaticManager(width, count, 1, **shared),
        "aaue": AdaptiveManager(width, count, **shared),
    }
    experts = [normalised(expert, 1e-5) for expert in inputs["experts"].unbind(1)]
    noise = inputs["noise"].movedim(1, 0)
    out = {}
    for name, module in modules.items():
        for parameter, value in module.state_dict().items():
            out[f"init.{name}.{parameter}"] = value.clone()
        prefix = f"{name}."
        module.load_state_dict({k.removeprefix(prefix): v for k, v in case.weights.items() if k.startswith(prefix)})
        arguments = (experts, [inputs["cross"]], inputs["extra_query"])
        out[name] = module.eval()(*arguments)
        out[f"{name}_train"] = module.train()(*arguments, noise=noise)
    return out


def sam_reference(case: Case) -> dict[str, Tensor]:
    config, inputs, weights = case.config, case.inputs, case.weights
    eps, count = config["layer_norm_eps"], config["num_experts"]
    previous = config["num_previous_cross"]
    manager = StaticManager(config["hidden_size"], count, previous, softmax=False, noise=False, eps=eps)
    expected = torch.cat([torch.full((count,), 1 / count), torch.full((previous,), 1 / previous)])
    torch.testing.assert_close(manager.layer_scores[0, :, 0, 0], expected)
    state = {"layer_scores": torch.cat([weights["expert_scores"], weights["cross_scores"]])[None, :, None]}
    for i in range(count + previous):
        state |= {f"LayerNorm.{i}.{part}": weights[f"layernorm_{part}"][i] for part in ("weight", "bias")}
    manager.load_state_dict(state)
    experts = [normalised(expert, eps) for expert in inputs["experts"].unbind(1)]
    return {"out": manager(experts, list(inputs["previous_cross"].unbind(1)))}


def ov_managers(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    jitter = config["jitter_eps"]
    experts, hidden, query = inputs["experts"], inputs["hidden"], inputs["query"]
    out = {}
    for name in sorted({key.split(".")[0] for key in case.weights}):
        state = {key.removeprefix(f"{name}."): value for key, value in case.weights.items() if key.startswith(f"{name}.")}
        count = config["num_experts"]
        if "layer_scores" in state:
            fewer = state["layer_scores"].shape[1] == count - 1
            manager: nn.Module = StaticStreamManager(config["hidden_size"], count, skip_last=fewer, jitter=jitter)
        else:
            manager = AdaptiveStreamManager(config["hidden_size"], count, name, jitter)
        manager.load_state_dict(state)
        out[name] = manager.eval()(experts, hidden, query)
        out[f"{name}_updated_hidden"] = hidden + out[name]
        if f"uniform_{name}" in inputs:
            out[f"{name}_train"] = manager.train()(experts, hidden, query, inputs[f"uniform_{name}"])
    return out


def ov_injection(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    parts = {
        part: {key.removeprefix(f"{part}."): value for key, value in case.weights.items() if key.startswith(f"{part}.")}
        for part in ("llm", "mm_projector")
    }
    names = {*inspect.signature(Qwen2Config).parameters, "rope_theta"}
    llm = Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in config.items() if k in names}, tie_word_embeddings=False)).eval()
    assert not llm.load_state_dict(parts["llm"], strict=False).unexpected_keys
    width = config["hidden_size"]
    projector = nn.Sequential(nn.Linear(config["vision_hidden"], width), nn.GELU(), nn.Linear(width, width))
    projector.load_state_dict(parts["mm_projector"])
    kind = config["mm_manager_type"].replace("_zerouni", "")
    managers = StreamManagers(width, config["num_experts"], config["injection_layers"], kind).eval()
    managers.load_state_dict({k: v for k, v in case.weights.items() if k.startswith("manager")})
    states = projector(inputs["vision_hidden_states"])
    experts = managers.experts(states[None, :-1])
    embed = llm.get_input_embeddings()
    before, after = embed(inputs["pre_ids"]), embed(inputs["post_ids"])
    tokens = torch.cat([before, states[None, -1], after], dim=1)
    span = torch.arange(config["visual_tokens"])[None] + config["tokens_before"]
    query = torch.arange(config["tokens_after"])[None] + config["tokens_before"] + config["visual_tokens"]
    out = {"experts": experts, "logits_without_manager": llm(inputs_embeds=tokens).logits}
    seen: dict[str, Tensor] = {}
    with managers.attached(llm.model.layers, experts, span, query):
        for layer in config["injection_layers"]:
            hook = partial(_keep_input, seen, f"hidden_before_layer_{layer}")
            llm.model.layers[layer].register_forward_pre_hook(hook, with_kwargs=True)
        out["logits"] = llm(inputs_embeds=tokens).logits
    return out | seen


def _keep_input(seen: dict[str, Tensor], name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
    seen.setdefault(name, args[0] if args else kwargs["hidden_states"])


def build(case: Case) -> TwoTower:
    """The model of a file, all of whose sizes but the numbers of heads come from its weights, checked against the config."""
    config = case.config
    managed = config["model_type"] == "MT"
    connector = {"eps": config["connector_layer_norm_eps"]} if config["model_type"] != "METER" else {}
    if managed:
        connector["mask_padding"] = False
    model = model_from_official(
        case.weights,
        connector,
        heads=config["num_heads"],
        image_heads=config["vision_heads"],
        text_heads=config["text_heads"],
        padding_id=config["pad_token_id"],
        image_eps=config["vision_layer_norm_eps"],
        text_eps=config["text_layer_norm_eps"],
        cross_eps=config["cross_layer_norm_eps"],
        mlm_eps=config["cross_layer_norm_eps"],
    )
    assert type(model.connector).__name__ == CONNECTORS[config["model_type"]]
    assert (model.width, model.levels) == (config["hidden_size"], config["num_layers"])
    if managed:
        assert isinstance(model.connector, Managers)
        counts = [len(model.connector.read[side]) for side in ("text", "image")]
        assert counts == [config["managed_layers_text"], config["managed_layers_image"]]
    return model.eval()


def _score(logits: Tensor, targets: Tensor) -> Tensor:
    return targets.gather(1, logits.argmax(1, keepdim=True)).mean()


def _scale(config: dict, name: str) -> float:
    """The official code takes a multiplier that is not a whole number for an absolute rate."""
    value = config[name]
    return value if isinstance(value, int) else value / config["learning_rate"]


RUNNERS = {
    "forward": forward,
    "pretrain": pretrain,
    "meter_none": pretrain,
    "itc_hard_negatives": itc_hard_negatives,
    "downstream": downstream,
    "retrieval_rerank": retrieval_rerank,
    "hf_port": hf_port,
    "utils_metrics_schedule": utilities,
    "utils_param_groups": utilities,
    "manager_modules": manager_modules,
    "sam_reference": sam_reference,
    "ov_managers": ov_managers,
    "ov_injection": ov_injection,
}
