"""Runs the reference files of the fisheye + ultrasonic fusion (specification: BEV fusion, section 10).

The method's code is private: these are float64 references of our own definitions, the fisheye projection also checked
against WoodScape's calibration code.
"""

from __future__ import annotations

import numpy as np
import torch

from datamodules.simulated.driving.scene import Scene, cast, occupancy
from datamodules.simulated.driving.ultrasound import Acoustics, clean_traces, echoes
from models.bev_fusion.cadconv import CaDConv
from models.bev_fusion.decoder import Decoder, Fusion
from models.bev_fusion.echoes import (
    UltrasonicRig,
    combine_pairs,
    pair_geometry,
    pulse_traces,
    read_traces,
    speed_of_sound,
)
from models.bev_fusion.geometry import BevGrid, camera_from_json, sampling_grid
from models.bev_fusion.losses import class_loss, coarse_target, dice_loss, occupancy_loss
from models.bev_fusion.metrics import cell_scores, confusion, object_scores
from models.bev_fusion.view import sample_views
from models.io import load_strictly
from tests.golden.harness import Case, Masked

PARTS = ("cadconv.", "decoder.")


def projection(case: Case) -> dict:
    grid, heights, out = BevGrid(**case.config["grid"]), tuple(case.config["heights"]), {}
    for c, record in enumerate(case.config["calibrations"]):
        camera = camera_from_json(record)
        uv, theta, valid = camera.project(case.inputs[f"{c}.points"].numpy())
        rays, ray_valid = camera.unproject(case.inputs[f"{c}.pixels"].numpy())
        vehicle = camera.to_vehicle(rays)
        ground, ground_valid = camera.ground(vehicle)
        sampling, seen = sampling_grid(camera, grid, heights)
        sampling, seen = torch.from_numpy(sampling), torch.from_numpy(seen)
        ray_where = torch.from_numpy(ray_valid)[:, None].expand(-1, 3)
        ground_valid &= ray_valid
        features = sample_views(case.inputs[f"{c}.feat"][None], sampling[None], seen[None])[0]
        values = {
            "uv": torch.from_numpy(uv),
            "theta": torch.from_numpy(theta),
            "valid": torch.from_numpy(valid),
            "ray_cam": Masked(torch.from_numpy(rays), ray_where),
            "ray_vehicle": Masked(torch.from_numpy(vehicle), ray_where),
            "ray_valid": torch.from_numpy(ray_valid),
            "ground": Masked(torch.from_numpy(ground), torch.from_numpy(ground_valid)[:, None].expand(-1, 3)),
            "ground_valid": torch.from_numpy(ground_valid),
            "grid": Masked(sampling, seen[..., None].expand_as(sampling)),
            "grid_valid": seen,
            "bev_feat": features,
            "theta_max": torch.tensor([camera.theta_max], dtype=torch.float64),
            "rotation": torch.from_numpy(camera.rotation),
        }
        out |= {f"{c}.{name}": value for name, value in values.items()}
    return out | {"bev_xy": torch.from_numpy(grid.centres())}


def ultrasonic_bev(case: Case) -> dict:
    config, inputs = case.config, case.inputs
    positions = tuple((x, y, 0.0) for x, y in inputs["sensor_xy"].tolist())
    pairs = tuple(tuple(pair) for pair in inputs["pairs"].tolist())
    rig = UltrasonicRig(
        positions,
        tuple(inputs["sensor_yaw"].tolist()),
        pairs,
        config["az_half"],
        config["az_max"],
        config["sample_rate"],
        config["first_sample"],
    )
    speed = speed_of_sound(torch.tensor([config["temperature_c"]], dtype=torch.float64))
    distance, weight = pair_geometry(rig, BevGrid(**config["grid"]))
    traces = inputs["traces"]
    heard = read_traces(traces[None], distance, speed, rig.sample_rate, rig.first_sample, config["range_gain"])
    return {
        "bev": combine_pairs(heard, weight.float())[0],
        "pair_amplitude": heard[0],
        "pair_weight": weight.float(),
        "speed_of_sound": speed,
        "pulse_traces": pulse_traces(
            inputs["echo_times"],
            inputs["echo_amplitudes"],
            traces.shape[1],
            rig.sample_rate,
            rig.first_sample,
            config["pulse_sigma"],
        ).float(),
    }


def fusion_decoder(case: Case) -> dict:
    config, camera, label = case.config, case.inputs["camera"], case.inputs["label"]
    weights = {part: {k.removeprefix(part): v for k, v in case.weights.items() if k.startswith(part)} for part in PARTS}
    of_cadconv, of_decoder = weights.values()
    middle, width = of_cadconv["compress.0.weight"].shape[:2]
    dynamic, select = (
        CaDConv(width, config["dilations"], config["groups"], middle, mode).eval() for mode in ("dynamic", "select")
    )
    for convolution, other in ((dynamic, ("static.",)), (select, ("kernel.", "value.", "out."))):
        load_strictly(convolution, {key: value for key, value in of_cadconv.items() if not key.startswith(other)})
    channels, inside = of_decoder["stage1.0.0.weight"].shape[:2]
    decoder = Decoder(inside, channels, len(of_decoder["cls.weight"])).eval()
    load_strictly(decoder, of_decoder)
    ultrasonic = case.inputs["ultrasonic"].clone().requires_grad_()
    alpha, taps = dynamic.choices(ultrasonic)
    aligned = dynamic(ultrasonic)
    (gradient,) = torch.autograd.grad((aligned * camera).sum(), ultrasonic)
    found = decoder(Fusion("concat", config["channels"])(camera, aligned))
    target, valid = coarse_target(label)
    return {
        "cadconv": aligned,
        "cadconv_select": select(ultrasonic),
        "dilation_weight": alpha,
        "kernel": taps,
        "grad_ultrasonic": gradient,
        "occ_logit": found.coarse,
        "class_logits": found.classes,
        "loss_occ": occupancy_loss(found.coarse, target, valid, config["pos_weight"]),
        "loss_ce": class_loss(found.classes, label, case.inputs["class_weight"]),
        "loss_dice": dice_loss(found.classes, label),
        "coarse_label": target,
        "coarse_valid": valid,
        **{f"fuse_{kind}": Fusion(kind, config["channels"])(camera, aligned) for kind in ("add", "max")},
    }


def metrics(case: Case) -> dict:
    config = case.config
    label, predicted = case.inputs["label"].numpy(), case.inputs["pred"].numpy()
    matrix = confusion(label, predicted, config["num_classes"])
    found = object_scores(label, predicted, BevGrid(**config["grid"]), config["match_radius"], config["min_cells"])
    out = {name: torch.from_numpy(value) for name, value in cell_scores(matrix).items()}
    out |= {"confusion": torch.from_numpy(matrix), "object_table": torch.from_numpy(found.table)}
    for name in ("euclidean", "absolute", "normalized"):
        out[name] = torch.tensor([getattr(found, name)], dtype=torch.float64)
    for name in ("recall", "precision"):
        out[f"object_{name}"] = torch.tensor([getattr(found, name)], dtype=torch.float64)
    return out


def simulator(case: Case) -> dict:
    config = case.config
    inputs = {name: value.numpy() for name, value in case.inputs.items()}
    objects = len(inputs["classes"])
    scene = Scene(inputs["boxes"], inputs["cylinders"], inputs["classes"], inputs["reflectivity"], np.zeros((objects, 3)))
    hits = cast(scene, inputs["ray_origin"], inputs["ray_dirs"])
    rig = UltrasonicRig(
        tuple(map(tuple, inputs["sensor_xyz"].tolist())),
        tuple(inputs["sensor_yaw"].tolist()),
        tuple(map(tuple, inputs["pairs"].tolist())),
        config["az_half"],
        config["az_max"],
        config["sample_rate"],
        config.get("first_sample", 0),
    )
    air = Acoustics(
        el_half=config["el_half"],
        occlusion=config["occ"],
        r_min=config["r_min"],
        edge=config["edge"],
        attenuation=config["alpha"],
        pulse_sigma=config["pulse_sigma"],
        ring=config["ring"],
        ring_tau=config["ring_tau"],
    )
    time, amplitude = echoes(scene, rig, config["temperature_c"], air)
    traces = clean_traces(time, amplitude, rig, config["num_samples"], air)
    return {
        "ray_t": torch.from_numpy(hits.t),
        "ray_id": torch.from_numpy(hits.id),
        "ray_normal": torch.from_numpy(hits.normal),
        "echo_time": torch.from_numpy(time),
        "echo_amplitude": torch.from_numpy(amplitude),
        "clean_traces": torch.from_numpy(traces.astype(np.float32)),
        "label": torch.from_numpy(occupancy(scene, BevGrid(**config["grid"]))),
    }


RUNNERS = {
    "projection": projection,
    "ultrasonic_bev": ultrasonic_bev,
    "fusion_decoder": fusion_decoder,
    "metrics": metrics,
    "simulator": simulator,
}
