"""Runs All-in-One's reference files through our implementation and importer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from datamodules.readers.base import BadSample
from datamodules.transforms.frame_sampling import middle_frames, random_bounds
from datamodules.transforms.video import HALF, ClipTransform, resize_image, to_tensor
from models.all_in_one import objectives
from models.all_in_one.checkpoint import HEADS, load_official, named_tensors
from models.all_in_one.model import AllInOne
from models.all_in_one.rolling import roll_tokens
from models.batch import IGNORE_INDEX
from models.io import CheckpointError
from models.metrics.video_retrieval import any_hit_recall, rank_summary, text_to_video_ranks, video_to_text_ranks
from tests.golden.harness import Case

HEAD_WIDTH = 64  # of every released size: the number of attention heads cannot be read from the weights


def token_roll(case: Case) -> dict[str, Tensor]:
    return {
        f"y{i}": roll_tokens(case.inputs[f"x{i}"], setting["T"], setting["n_div"])
        for i, setting in enumerate(case.config["cases"])
    }


def forward_multimodal(case: Case) -> dict[str, Tensor]:
    model, inputs = _model(case), case.inputs
    seen = _watch(model)
    encoded = model.encode_pair(inputs["text_ids"], inputs["text_masks"], model.embed(inputs["image"]), inputs["patch_perm"])
    only_first = model.encode_pair(
        inputs["text_ids"], inputs["text_masks"], model.embed(inputs["image"]), inputs["patch_perm"], read="first"
    )
    torch.testing.assert_close(only_first.pooled, encoded.pooled, rtol=1e-4, atol=1e-5)
    return {
        **seen,
        "text_feats": encoded.text,
        "image_feats": encoded.visual,
        "cls_feats": encoded.pooled,
        "raw_cls_feats": encoded.first,
        "temporal_embed": model.transformer.temporal_embed,
    }


def forward_unimodal_vtc(case: Case) -> dict[str, Tensor]:
    model, inputs = _model(case), case.inputs
    text = model.encode_text(inputs["text_ids"], inputs["text_masks"])
    video = model.encode_video(model.embed(inputs["image"]), inputs["patch_perm"])
    text_embedding, video_embedding = (model.similarity_embeddings(e, of) for e, of in ((text, "text"), (video, "video")))
    return {
        "text_feats": model.txt_proj(text.text),
        "image_feats": model.vid_proj(video.visual),
        "text_cls_feats": text.pooled,
        "image_cls_feats": video.pooled,
        "text_raw": text.first,
        "image_raw": video.first,
        "sim": objectives.similarity(text_embedding, video_embedding),
        "vtc_loss": objectives.contrastive(text_embedding, video_embedding),
    }


def pretrain_losses(case: Case) -> dict[str, Tensor]:
    model, inputs = _model(case), case.inputs
    return _pretraining(
        model, inputs, "image", "false_image", inputs["patch_perm_mlm"], inputs["patch_perm_vtm"], _skipped(case.config)
    )


def downstream_losses(case: Case) -> dict[str, Tensor]:
    model, inputs, config = _model(case), case.inputs, case.config
    patches = model.embed(inputs["image"])

    def texts(prefix: str, count: int, own: bool = True) -> tuple[Tensor, Tensor]:
        parts = [("text_ids", "text_masks")] if own else []
        parts += [(f"{prefix}_{i}_ids", f"{prefix}_{i}_masks") for i in range(count - len(parts))]
        return tuple(torch.stack([inputs[part[k]] for part in parts], dim=1) for k in (0, 1))

    out = {}
    if "openend_logits" in case.wanted:
        questions = (inputs["text_ids"], inputs["text_masks"])
        logits, _ = objectives.answer_logits(model, *questions, patches, inputs["patch_perm_openend"])
        labels = inputs["vqa_labels"]
        out |= {"openend_logits": logits, "openend_loss": objectives.answer_loss(logits, labels)}
        known = labels != IGNORE_INDEX
        out["openend_accuracy"] = (logits.argmax(dim=1) == labels)[known].float().mean()
    for name, head, prefix, count, answer in (
        ("mc_vqa", "mc_vqa_classifier", "options_text", "n_opt", "answer"),
        ("choice", "rank_output", "false_text", "n_opt", "answer"),
        ("rank", "rank_output", "false_text", "n_false", None),
        ("vcr_q2a", "rank_output", "options_text", "n_vcr", "vcr_answer"),
        ("vcr_qar", "rank_output_2", "qar_text", "n_vcr", "reason_answer"),
    ):
        if f"{name}_scores" not in case.wanted:
            continue
        candidates = texts(prefix, config[count] + (name == "rank"), own=name != "vcr_qar")
        scores = objectives.candidate_scores(model, head, *candidates, patches, inputs[f"patch_perm_{name}"])
        labels = torch.zeros(len(scores), dtype=torch.int64) if answer is None else inputs[answer]
        out |= {f"{name}_scores": scores, f"{name}_loss": F.cross_entropy(scores.float(), labels)}
    return out


def cotrain_step(case: Case) -> dict[str, Tensor]:
    model, out = _model(case), {}
    for stream, still in (("video", False), ("image", True)):
        inputs = {name.removeprefix(f"{stream}_"): value for name, value in case.inputs.items() if name.startswith(stream)}
        found = _pretraining(
            model,
            inputs,
            "visual",
            "false_visual",
            inputs["patch_index_mlm"],
            inputs["patch_index_vtm"],
            _skipped(case.config),
            still,
        )
        out |= {f"{stream}_{name}": value for name, value in found.items()}
    return out | {"cotrain_total": out["video_total"] + out["image_total"]}


def checkpoint_import(case: Case) -> dict[str, Tensor]:
    return forward_multimodal(case)


def retrieval_metrics(case: Case) -> dict[str, Tensor]:
    config, inputs, out = case.config, case.inputs, {}
    names = [{"MedR": "median_rank", "MeanR": "mean_rank"}.get(name, f"recall@{name[1:]}") for name in config["order"]]
    ks = [int(name[1:]) for name in config["order"] if name.startswith("R")]

    def ordered(ranks: Tensor) -> Tensor:
        found = rank_summary(ranks, ks)
        return torch.tensor([found[name] for name in names], dtype=torch.float64)

    for i, _ in enumerate(config["sizes"]):
        scores = inputs[f"sims{i}"]
        owner = torch.arange(len(scores)) // (len(scores) // scores.shape[1])
        out[f"t2v{i}"] = ordered(text_to_video_ranks(scores, owner))
        out[f"v2t{i}"] = ordered(video_to_text_ranks(scores, owner))
    views = [objectives.similarity(text, video) for text, video in zip(inputs["mv_text"], inputs["mv_video"], strict=True)]
    out["mv_sims"] = torch.stack(views).mean(dim=0)
    out["mv_t2v"] = ordered(text_to_video_ranks(out["mv_sims"], torch.arange(len(out["mv_sims"]))))
    scores = inputs["fusion_scores"]
    right = inputs["fusion_text_video_id"][None, :] == torch.arange(len(scores))[:, None]
    recalls = []
    for name in config["fusion_order"]:
        direction, k = name.split("_R")
        matrices = (scores.T, right.T) if direction == "t2v" else (scores, right)
        recalls.append(any_hit_recall(*matrices, int(k)))
    return out | {"fusion_recalls": torch.tensor(recalls)}


def frames_and_transforms(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    slots = int(inputs["num_frames"].max())
    columns: dict[str, list] = {"uniform_idx": [], "rand_low": [], "rand_high": []}
    for wanted, length in zip(inputs["num_frames"].tolist(), inputs["vlen"].tolist(), strict=True):
        columns["uniform_idx"].append(middle_frames(wanted, length))
        try:
            low, high = random_bounds(wanted, length, official=True)
        except BadSample:
            low = high = np.zeros(0, np.int64)
        columns["rand_low"].append(low)
        columns["rand_high"].append(high)
    out = {
        name: torch.stack([F.pad(torch.from_numpy(row), (0, slots - len(row)), value=-1) for row in rows])
        for name, rows in columns.items()
    }
    transform = ClipTransform(config["crop_size"])
    assert transform.short == config["resize_short"]
    out["clip_val"] = transform(inputs["clip"].permute(1, 2, 3, 0).numpy()).transpose(0, 1)
    image = Image.fromarray(inputs["image"].permute(1, 2, 0).numpy())
    resized = resize_image(image, config["pixelbert_size"], config["pixelbert_longer"])
    out["image_pixelbert"] = to_tensor(np.asarray(resized)[None], HALF)[0]
    return out


def _model(case: Case) -> AllInOne:
    config = case.config
    model = model_from_official(
        case.weights, heads=config["num_heads"], frames=config["num_frames"], text_length=config["max_text_len"]
    )
    assert model.width == config["hidden_size"] and len(model.transformer.blocks) == config["num_layers"]
    assert model.transformer.distilled == config["distilled"]
    return model.eval()


def _watch(model: AllInOne) -> dict[str, Tensor]:
    """Outputs inside the forward pass, by hooks, of the first call."""
    seen: dict[str, Tensor] = {}

    arrange = model.transformer.arrange

    def arranged(*arguments):
        tokens = arrange(*arguments)
        seen.setdefault("visual_embed", tokens.tokens.clone())
        return tokens

    model.transformer.arrange = arranged
    model.text_embeddings.register_forward_hook(lambda m, a, o: seen.update(text_embeddings=seen.get("text_embeddings", o)))
    block = model.transformer.blocks[0]
    block.register_forward_hook(lambda m, a, o: seen.update(block0_in=seen.get("block0_in", a[0])))
    block.register_forward_hook(lambda m, a, o: seen.update(block0_out=seen.get("block0_out", o)))
    model.transformer.norm.register_forward_hook(lambda m, a, o: seen.update(norm_out=seen.get("norm_out", o)))
    return seen


def _skipped(config: dict[str, Any]) -> int:
    return 2 if "deit" in config["vit"] else 1


def _pretraining(
    model: AllInOne,
    inputs: dict[str, Tensor],
    clip: str,
    false_clip: str,
    order_mlm: Tensor,
    order_vtm: Tensor,
    skip_visual: int,
    still: bool = False,
) -> dict[str, Tensor]:
    ids, mask, matched = inputs["text_ids"], inputs["text_masks"], inputs["itm_labels"]
    grids = [grids_from_pixels(inputs[name].flatten(0, 1), model.transformer.patch_size) for name in (clip, false_clip)]
    patches = model.embed(inputs[clip], grids[0], still)
    chosen = matched == 0
    false_grids = None
    if grids[1] is not None:
        false_grids = grids[1].view(len(ids), -1, 2)[chosen].flatten(0, 1)
    false_patches = model.embed(inputs[false_clip][chosen], false_grids, still)
    full = model.encode_pair(inputs["text_ids_mlm"], mask, patches, order_mlm)
    mlm_loss, _ = objectives.masked_language(model, inputs["text_ids_mlm"], mask, inputs["text_labels_mlm"], patches, order_mlm)
    vtm = objectives.video_text_matching(model, ids, mask, matched, patches, false_patches, order_vtm, skip_visual)
    mixed = objectives.with_false_clips(patches, false_patches, matched)
    arranged = [model.transformer.arrange(patches, order_mlm), model.transformer.arrange(mixed, order_vtm)]
    short = ids.shape[1] - vtm.transport.cost.shape[1]
    masks = [torch.ones(a.tokens.shape[:2], dtype=torch.int64) if a.mask is None else a.mask.long() for a in arranged]
    return {
        "mlm_logits": model.mlm_score(full.text),
        "mlm_loss": mlm_loss,
        "vtm_logits": vtm.logits,
        "vtm_loss": vtm.match,
        "vtm_wpa_loss": vtm.align,
        "ot_cost": F.pad(vtm.transport.cost, (0, 0, 0, short)),
        "ot_plan": F.pad(vtm.transport.plan, (0, short)),
        "total": mlm_loss + vtm.match + vtm.align,
        "visual_embed_mlm": arranged[0].tokens,
        "visual_mask_mlm": masks[0],
        "visual_mask_vtm": masks[1],
    }


def grids_from_pixels(frames: Tensor, patch: int) -> Tensor | None:
    """Which patches of zero-padded frames are real, by the official rule: (N, 2) rows and columns, None if all are.

    The rule (inherited from ViLT) looks at each patch's top-left pixel: padding where its channels sum to exactly 0. Rows
    are counted in the first column and columns in the first row, so a normalised pixel that happens to be 0 there is
    taken for padding, and a frame without any is an error.

    Args:
        frames: (N, 3, H, W).
    """
    corners = frames[:, :, ::patch, ::patch].sum(dim=1) != 0
    grids = torch.stack([corners[:, :, 0].sum(dim=1), corners[:, 0, :].sum(dim=1)], dim=1)
    if bool((grids == 0).any()):
        raise ValueError("a frame is all padding: its top-left pixels are exactly 0")
    full = torch.tensor(corners.shape[1:], device=grids.device)
    return None if bool((grids == full).all()) else grids


def model_from_official(weights: Mapping[str, Tensor], heads: int | None = None, **settings: Any) -> AllInOne:
    """The model that ``weights`` (official names) belong to, loaded.

    Args:
        heads: of the attention; None: one per 64 channels, as in every released size.
        settings: arguments of :class:`AllInOne` that weights do not tell, or ``frames`` and ``text_length`` to change.

    Raises CheckpointError when the weights are of another architecture.
    """
    named = named_tensors(weights)
    model = AllInOne(**{**_sizes(named, heads), **settings})
    load_official(model, named)
    return model


def _sizes(named: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    try:
        width, _, patch, _ = named["transformer.patch_embed.proj.weight"].shape
        vocab = len(named["text_embeddings.word_embeddings.weight"])
        length = len(named["text_embeddings.position_embeddings.weight"])
        hidden = len(named["transformer.blocks.0.mlp.fc1.weight"])
        positions = named["transformer.pos_embed"].shape[1]
    except KeyError as error:
        raise CheckpointError(f"the checkpoint lacks {error}: it is no All-in-One.") from None
    distilled = "transformer.dist_token" in named
    depth = 1 + max(int(m.group(1)) for name in named if (m := re.match(r"transformer\.blocks\.(\d+)\.", name)))
    side = round((positions - (2 if distilled else 1)) ** 0.5)
    temporal = named.get("transformer.temporal_embed")
    sizes = {
        "width": width, "depth": depth, "heads": heads or max(width // HEAD_WIDTH, 1), "mlp_ratio": hidden / width,
        "patch_size": patch, "image_size": side * patch, "vocab_size": vocab, "text_length": length, "distilled": distilled,
        "frames": 3 if temporal is None else temporal.shape[1],
        "tasks": sorted({HEADS[p] for n in named if (p := n.split(".")[0]) in HEADS and HEADS[p]}),
    }  # fmt: skip
    if "vqa_classifier.4.weight" in named:
        sizes["num_answers"] = len(named["vqa_classifier.4.weight"])
    if "txt_proj.weight" in named:
        sizes["embed_dim"] = len(named["txt_proj.weight"])
    return sizes


RUNNERS = {
    "token_roll": token_roll,
    "forward_multimodal": forward_multimodal,
    "forward_distilled": forward_multimodal,
    "forward_unimodal_vtc": forward_unimodal_vtc,
    "pretrain_losses": pretrain_losses,
    "downstream_losses": downstream_losses,
    "cotrain_step": cotrain_step,
    "checkpoint_import": checkpoint_import,
    "retrieval_metrics": retrieval_metrics,
    "frames_and_transforms": frames_and_transforms,
}
