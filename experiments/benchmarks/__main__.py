"""Runs the benchmarks: ``python -m experiments.benchmarks [file or file/case ...]``.

The two sides of a case run in processes of their own, turn by turn, so that both meet the same noise and each has its own
peak memory. Time is the median of the ratios of neighbouring turns (``cpu_time_ratio`` counts the time of all threads and
suffers less from what else runs on the machine); memory is the growth of the resident set over what
was there before the step (on a GPU, of the allocator). A step returns its result, and results that differ are an error.
Ratios are ours / plain. Everything is written to ``outputs/bench_<device>_<dtype>.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ("__init__", "__main__", "measure")
FILES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in HELPERS)
ROUNDS = 5
# Relative difference of the results' norms above which the two sides do not compute the same.
SAME = {"fp32": 1e-3, "bf16": 3e-2, "fp16": 1e-2}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FILES)}, or one case: file/case; default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each side after the first (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=tuple(SAME), default="fp32", help="of autocast around a step (default %(default)s)")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported, here and in the processes of the sides
    if chosen.side:
        serve(chosen.names[0], chosen.side, chosen.dtype)
        return
    device, dtype = _device(chosen.device), chosen.dtype
    path = ROOT / "outputs" / f"bench_{device}_{dtype}.json"
    path.parent.mkdir(exist_ok=True)
    found = json.loads(path.read_text()) if path.is_file() else {}
    found["machine"] = _machine()
    failed = []
    for name in chosen.names or FILES:
        file, _, case = name.partition("/")
        module = importlib.import_module(f"experiments.benchmarks.{file}")
        measures = {
            wanted: partial(compare, f"{file}/{wanted}", chosen.rounds, chosen.dtype) for wanted in getattr(module, "CASES", {})
        }
        measures |= {wanted: partial(alone, f"{file}/{wanted}", dtype) for wanted in getattr(module, "ALONE", {})}
        measures |= getattr(module, "MEASURES", {})
        if not measures:  # it needs another device
            print(f"{file}: nothing measured. {(module.__doc__ or '').splitlines()[0]}", flush=True)
        for wanted, measure in measures.items():
            if case in ("", wanted):
                try:
                    found[f"{file}/{wanted}"] = measure()
                except SideFailed as error:
                    failed.append(f"{file}/{wanted}: {error}")
                    print(failed[-1], flush=True)
                else:
                    _print(f"{file}/{wanted}", found[f"{file}/{wanted}"])
        path.write_text(json.dumps(found, indent=1))
    print(f"written to {path}")
    if failed:
        raise SystemExit(f"{len(failed)} failed")


class SideFailed(Exception):
    """A side died, or the two do not compute the same."""


def compare(name: str, rounds: int = ROUNDS, dtype: str = "fp32") -> dict[str, float]:
    """Time and memory of one case: ours, plain and their ratios."""
    sides = {side: _Side(name, side, dtype) for side in ("ours", "plain")}
    turns: dict[str, list[dict]] = {side: [] for side in sides}
    try:
        for _ in range(rounds + 1):
            for side, process in sides.items():
                turns[side].append(process.turn())
    finally:
        for process in sides.values():
            process.close()
    norms = [turns[side][-1]["norm"] for side in sides]
    if abs(norms[0] - norms[1]) > SAME[dtype] * max(abs(norms[1]), 1e-12):
        raise SideFailed(f"the two sides compute different results ({norms[0]} and {norms[1]})")
    timed, spent = (
        [(a[clock], b[clock]) for a, b in zip(turns["ours"][1:], turns["plain"][1:], strict=True)]
        for clock in ("seconds", "cpu_seconds")
    )
    most = {side: max(turn["megabytes"] for turn in turns[side]) for side in sides}
    return {
        "time_ratio": statistics.median(a / b for a, b in timed),
        "cpu_time_ratio": statistics.median(a / max(b, 1e-9) for a, b in spent),
        "memory_ratio": most["ours"] / max(most["plain"], 1.0),
        "seconds": statistics.median(a for a, _ in timed),
        "plain_seconds": statistics.median(b for _, b in timed),
        "megabytes": most["ours"],
        "plain_megabytes": most["plain"],
    }


def alone(name: str, dtype: str = "fp32") -> dict[str, float]:
    """Time and memory of ours by itself; a short step is taken twice, the first time to warm up."""
    process = _Side(name, "ours", dtype)
    turn = process.turn()
    if turn["seconds"] < 10:
        turn = process.turn()
    process.close()
    return {"seconds": turn["seconds"], "megabytes": turn["megabytes"]}


class _Side:
    """A process that takes a step for each line it is sent."""

    def __init__(self, name: str, side: str, dtype: str):
        self.side = side
        command = [sys.executable, "-m", "experiments.benchmarks", name, "--side", side, "--dtype", dtype]
        environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}  # as in training
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)

    def turn(self) -> dict[str, float]:
        try:
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            killed = self.process.wait() == -signal.SIGKILL
            why = "was killed (probably out of memory)" if killed else "failed; its error is above"
            raise SideFailed(f"the side '{self.side}' {why}")
        return json.loads(line)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=60)


def serve(name: str, side: str, dtype: str) -> None:
    """The other end of :class:`_Side`."""
    import torch

    from run import keep_freed_memory

    keep_freed_memory()  # as in training
    torch.manual_seed(0)
    torch.set_default_device(_device(None))  # what a case makes is on the device
    types = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    file, _, case = name.partition("/")
    module = importlib.import_module(f"experiments.benchmarks.{file}")
    step: Callable[[], torch.Tensor] = {**getattr(module, "CASES", {}), **getattr(module, "ALONE", {})}[case](side)
    floor = reset_peak()
    for _ in sys.stdin:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began, spent = time.perf_counter(), time.process_time()
        with torch.autocast(_device(None), dtype=types[dtype], enabled=dtype != "fp32"):
            result = step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, spent = time.perf_counter() - began, time.process_time() - spent
        norm = float(result.detach().double().norm())
        turn = {"seconds": seconds, "cpu_seconds": spent, "megabytes": peak() - floor, "norm": norm}
        print(json.dumps(turn), flush=True)


def reset_peak() -> float:
    """Start counting the peak anew; megabytes in use now."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    if os.path.exists("/proc/self/clear_refs"):
        give_back_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def give_back_freed_memory() -> None:
    """Without it what was freed while the step was prepared counts as in use, and the step takes it again at no cost."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def peak() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def _device(wanted: str | None) -> str:
    """The kind of device that everything runs on."""
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no GPU here.")
    return "cuda" if torch.cuda.is_available() else "cpu"


def _machine() -> dict:
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return {"device": device, "torch": torch.__version__, "python": platform.python_version()}


def _print(name: str, found: dict[str, float] | float) -> None:
    if isinstance(found, dict) and "time_ratio" in found:
        text = f"time x{found['time_ratio']:.2f} ({found['seconds']:.3f} / {found['plain_seconds']:.3f} s, "
        text += f"of CPUs x{found['cpu_time_ratio']:.2f})   "
        text += f"memory x{found['memory_ratio']:.2f} ({found['megabytes']:.0f} / {found['plain_megabytes']:.0f} MB)"
    elif isinstance(found, dict):
        text = "  ".join(f"{key} {value:.4g}" for key, value in found.items())
    else:
        text = f"{found:.4g}"
    print(f"{name:44} {text}", flush=True)


if __name__ == "__main__":
    main()
