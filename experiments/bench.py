"""``make bench``: measurements as ratios against plain forms in one run. Machines are noisy; medians are shown.

Each side of a loss runs in a process of its own, so that its peak memory is its own. Results go to ``outputs/bench.json``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS, WIDTH, REPEATS = 4096, 512, 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=[f"{loss}-{form}" for loss in ("sigmoid", "infonce") for form in ("ours", "plain")])
    chosen = parser.parse_args().side
    if chosen:
        print(json.dumps(_measure_loss(*chosen.split("-"))))
        return
    found = {"help_seconds": _seconds(["--help"]), "config_error_seconds": _seconds(["experiment=sail_dinov2", "seed=x"])}
    for loss in ("sigmoid", "infonce"):
        ours, plain = (_other_process(f"{loss}-{form}") for form in ("ours", "plain"))
        found[f"{loss}_time_ratio"] = ours["seconds"] / plain["seconds"]
        found[f"{loss}_memory_ratio"] = ours["megabytes"] / plain["megabytes"]
    for name, value in found.items():
        print(f"{name:24} {value:8.3f}")
    target = ROOT / "outputs" / "bench.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(found, indent=1))


def _seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / "run.py"), *arguments], capture_output=True, check=False)
    return time.perf_counter() - began


def _other_process(side: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-m", "experiments.bench", "--side", side], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def _measure_loss(loss: str, form: str) -> dict[str, float]:
    """Seconds (median) of a forward and backward pass, and megabytes of peak memory above inputs and their gradients."""
    sys.path.insert(0, str(ROOT))
    import torch

    from models.losses.contrastive import InfoNCELoss, SigmoidLoss
    from run import keep_freed_memory
    from tests.reference import contrastive as plain

    keep_freed_memory()
    torch.manual_seed(0)
    image, *texts = (torch.randn(PAIRS, WIDTH, requires_grad=True) for _ in range(3))
    scale, bias = torch.tensor([20.0], requires_grad=True), torch.tensor([-10.0], requires_grad=True)
    ours = (SigmoidLoss() if loss == "sigmoid" else InfoNCELoss()).forward

    def step() -> None:
        if form == "ours":
            value = ours(image, texts, scale, bias).losses["contrastive"]
        elif loss == "sigmoid":
            value = plain.sigmoid_loss(image, texts, scale, bias)
        else:
            value = plain.info_nce(image, texts[0], scale)
        value.backward()

    for tensor in (image, *texts):
        tensor.grad = torch.zeros_like(tensor)
    before, times = _peak(), []
    for _ in range(REPEATS):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return {"seconds": statistics.median(times), "megabytes": max(_peak() - before, 1.0)}


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
