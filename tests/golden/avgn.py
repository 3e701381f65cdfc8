"""Runs AVGN's reference files through our implementation and importer."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datamodules.transforms.frame_sampling import sample_frames
from datamodules.transforms.sound import cut_clip
from models.avgn import losses
from models.avgn.aespa import AESPA
from models.avgn.audio import LogMel, LogSTFT, mel_filters
from models.avgn.checkpoint import canonical, load_into
from models.avgn.classifier import CumulativeClassifier
from models.avgn.exits import apply_exit, exit_confidence, exit_thresholds
from models.avgn.network import AVGN, Glance, take
from models.avgn.policy import PolicyNetwork, crop_patches
from models.avgn.saliency import top_snippets
from models.io import load_strictly
from models.metrics.average_precision import average_precision, mean_average_precision, multi_hot
from models.metrics.classification import top_k_accuracy
from tests.golden.harness import Case


def logmel(case: Case) -> dict[str, Tensor]:
    config, cut, alt = case.config, case.config["cut"], case.config["stft_alt"]
    assert (config["power"], config["window"], config["center"]) == (2.0, "hann periodic", True)
    assert (config["mel_scale"], config["mel_norm"]) == ("htk", None)
    names = ("sample_rate", "n_fft", "win_length", "hop_length", "f_min", "f_max", "eps", "pad_mode")
    mel = LogMel(**{name: config[name] for name in names}, bands=config["n_mels"], frames=config["n_frames"])
    out = {}
    if alt:
        linear = LogSTFT(**{name: alt[name] for name in ("n_fft", "win_length", "hop_length", "pad_mode", "eps")})
        out["log_stft_24k"] = linear(case.inputs["wave"])[0]
    if cut:
        wave, short = case.inputs["cut_wave"].numpy(), case.inputs["cut_short"].numpy()
        rate, length = cut["sample_rate"], cut["length"]
        clips = [cut_clip(wave, centre, length, rate) for centre in case.inputs["cut_centres"].tolist()]
        out["cut"] = torch.from_numpy(np.stack(clips))
        out["cut_short"] = torch.from_numpy(cut_clip(short, len(short) / rate / 2, length, rate))
    return out | {
        "mel_fb": mel_filters(
            config["n_fft"] // 2 + 1, config["n_mels"], config["sample_rate"], config["f_min"], config["f_max"]
        ),
        "logmel": mel(case.inputs["wave"]),
    }


def adafocus_v2_modules(case: Case) -> dict[str, Tensor]:
    weights = canonical(case.weights)
    hidden, flat = weights["policy.encoder.4.weight"].shape
    reduced, channels = weights["policy.encoder.0.weight"].shape[:2]
    policy = PolicyNetwork(channels, flat // reduced, hidden)
    steps, classes, width = weights["classifier.heads.weight"].shape
    classifier = CumulativeClassifier(weights["classifier.mlp.0.weight"].shape[1], classes, steps, width)
    for name, part in (("policy.", policy), ("classifier.", classifier)):
        load_strictly(part.eval(), {key.removeprefix(name): value for key, value in weights.items() if key.startswith(name)})
    actions = policy(case.inputs["policy_featmap"], case.config["num_segments"]).flatten(0, 1)
    action_leaf = actions.detach().requires_grad_()
    frames = case.inputs["frames"].clone().requires_grad_()
    patches = crop_patches(frames, action_leaf, case.config["patch_size"])
    (patches * case.inputs["patch_loss_weight"]).sum().backward()
    logits = classifier(case.inputs["classifier_features"])
    return {
        "actions": actions,
        "patches": patches,
        "grad_actions": action_leaf.grad,
        "grad_frames": frames.grad,
        "step_logits": logits,
        "last_logits": logits[:, -1],
    }


class _Map(nn.Module):
    """Stands for an encoder whose output the file gives."""

    def __init__(self, out_dim: int, side: int):
        super().__init__()
        self.out_dim, self.side = out_dim, side

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), self.out_dim, self.side, self.side)


class _StubLocal(nn.Module):
    """The local encoder of the file's notes."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight, self.out_dim = weight, len(weight)

    def forward(self, patch: Tensor) -> Tensor:
        return torch.tanh(patch.mean(dim=(2, 3)) @ self.weight.T + patch[:, :, 0, 0] @ self.weight.T)


def glance_forward(case: Case) -> dict[str, Tensor]:
    config, inputs = case.config, case.inputs
    network = AVGN(
        _Map(config["visual_dim"], config["map_size"]),
        _Map(config["audio_dim"], config["map_size"]),
        _StubLocal(inputs["stub_local"]),
        nn.Identity(),
        config["num_classes"],
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        num_selected=config["num_selected"],
        order=config["order"],
        dim=config["d_model"],
        layers=config["avtest_layers"],
        heads=config["heads"],
        max_snippets=len(case.weights["avtest.pos"]),
        policy_hidden=config["policy_hidden"],
        mlp_width=config["mlp_width"],
    ).eval()
    assert load_into(network, case.weights) == ["audio_missing"]
    maps, audio = inputs["featmap"], inputs["audio"]
    glance = Glance(maps, maps.mean(dim=(3, 4)), audio, torch.ones(len(maps), dtype=torch.bool))
    saliency = network.saliency(glance)
    indices = top_snippets(saliency.logits, config["num_selected"], config["order"])
    chosen_maps, chosen_audio = take(maps, indices).flatten(0, 1), take(audio, indices).flatten(0, 1)
    actions = network.look(glance, indices)
    patches = network.patches(inputs["frames"], indices, actions)
    local = network.local_CNN(patches)
    logits = network.classifier(network.fuse(glance, indices, local.unflatten(0, indices.shape)))
    global_logits, audio_logits = network.global_fc(glance.visual), network.audio_fc(audio)
    local_logits = network.local_fc(local).unflatten(0, indices.shape)
    label = inputs["label"]
    truth = inputs["multi_hot"] if config["multi_label"] else F.one_hot(label, config["num_classes"])
    confidence = losses.snippet_confidence(global_logits, truth)
    target = losses.saliency_target(confidence, config["saliency_tau"], config["saliency_eps"])
    return {
        "saliency": saliency.logits,
        "tokens": saliency.tokens,
        "indices": indices,
        "aespa_map": network.aespa(chosen_maps, chosen_audio),
        "aespa_audio_attn": _audio_attention(network.aespa, chosen_maps, chosen_audio),
        "actions": actions,
        "patches": patches,
        "local_features": local,
        "step_logits": logits,
        "global_logits": global_logits,
        "audio_logits": audio_logits,
        "local_logits": local_logits,
        "confidence": confidence,
        "saliency_target": target,
        "loss_cat": losses.row_cross_entropy(logits, label),
        "loss_global": losses.row_cross_entropy(global_logits, label),
        "loss_audio": losses.row_cross_entropy(audio_logits, label),
        "loss_local": losses.row_cross_entropy(local_logits, label),
        "loss_saliency_kl": losses.saliency_kl(saliency.logits, target),
        "loss_saliency_rank": losses.saliency_rank(saliency.logits, confidence, config["rank_margin"]),
        "loss_saliency_bce": losses.saliency_bce(saliency.logits, confidence, config["saliency_eps"]),
    }


def metrics_exit(case: Case) -> dict[str, Tensor]:
    config, targets = case.config, case.inputs["targets"]
    train, val = case.inputs["train_logits"], case.inputs["val_logits"]
    scores = val[-1].softmax(dim=-1)
    first = targets[:, 0]
    out = {
        "map": mean_average_precision(scores, targets, "zero"),
        "ap": average_precision(scores, multi_hot(targets, config["num_classes"])).nan_to_num(),
        "top1": torch.tensor([top_k_accuracy(val[-1], first, 1)]),
        "top5": torch.tensor([top_k_accuracy(val[-1], first, 5)]),
    }
    if config["missing_class"] is not None:
        # As in the notes: videos whose first label is the class are gone, in others the label is erased.
        others = first != config["missing_class"]
        absent = torch.where(targets == config["missing_class"], -1, targets)
        out["map_missing_class_official"] = mean_average_precision(scores[others], absent[others], "official")
        out["map_missing_class_present_only"] = mean_average_precision(scores[others], absent[others], "leave_out")
    if config["segments"]:
        lengths, segments = case.inputs["num_frames"].tolist(), config["segments"]
        frames = [sample_frames(segments, length, official="adafocus") + 1 for length in lengths]
        out["frame_indices"] = torch.from_numpy(np.stack(frames))
    for length in (int(name.rpartition("_")[2]) for name in case.wanted if name.startswith("input_order_")):
        out[f"input_order_{length}"] = torch.tensor(input_order(length))
    for criterion in ("confidence", "entropy"):
        for p in config["exit_p"] or ():
            thresholds = exit_thresholds(exit_confidence(train, criterion), p)
            left = apply_exit(val, thresholds, criterion)
            step = torch.arange(1, config["stages"] + 1, dtype=torch.float64)
            cost = (left.counts.double() / config["n"] * step * config["stage_cost"]).sum()
            name = f"exit_{criterion}_{round(p * 10)}"
            out |= {f"{name}.thresholds": thresholds, f"{name}.counts": left.counts, f"{name}.expected_cost": cost}
            out[f"{name}.map"] = mean_average_precision(left.logits.softmax(dim=-1), targets, "zero")
    return {name: torch.as_tensor(value) for name, value in out.items()}


def input_order(length: int) -> list[int]:
    """AdaFocusV2's fixed order of visiting frames: the middle, first, last, then midpoints of ever shorter stretches."""
    order = list(dict.fromkeys([(length - 1) // 2, 0, length - 1]))
    while len(order) < length:
        seen = sorted(order)
        order += [(a + b) // 2 for a, b in zip(seen[:-1], seen[1:], strict=True) if b - a > 1]
    return order


def _audio_attention(aespa: AESPA, maps: Tensor, audio: Tensor) -> Tensor:
    """(N, n, n): how much the audio token looks at each place, the mean over heads of its softmax over all tokens."""
    tokens = aespa.norm1(aespa.tokens(maps, audio))
    weights = aespa.attn(tokens[:, :1], tokens, tokens)[1]  # (N, 1, 1 + n*n)
    return weights[:, 0, 1:].unflatten(1, maps.shape[2:])


RUNNERS = {
    "logmel": logmel,
    "adafocus_v2_modules": adafocus_v2_modules,
    "glance_forward": glance_forward,
    "metrics_exit": metrics_exit,
}
