"""What all cores cost where other work keeps them busy: SAIL's step on a thread for each core, against one thread."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, STEPS, PAIRS = 3, 2, 512


CORES = os.cpu_count() or 1


def busy(policy: str, processes: int) -> dict[str, float]:
    """The median over turns of the time of all threads / of one, while other processes do nothing but run.

    Args:
        policy: what a thread does that waits for another: ACTIVE spins, as OpenMP does by default; PASSIVE sleeps.
        processes: how many others there are.
    """
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        command = [sys.executable, "-c", "from experiments.benchmarks.threads import turns; turns()"]
        environment = {**os.environ, "OMP_WAIT_POLICY": policy}
        printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    finally:
        for other in others:
            other.kill()
    return {"all_threads_over_one": float(printed), "load": os.getloadavg()[0]}


def turns() -> None:
    from experiments.benchmarks.measure import seconds
    from experiments.benchmarks.sail import training_step
    from run import keep_freed_memory

    keep_freed_memory()
    step = training_step(PAIRS, 1280, 384, 256, "ours")
    ratios = []
    for _ in range(ROUNDS + 1):
        times = []
        for threads in (CORES, 1):
            torch.set_num_threads(threads)
            times.append(seconds(lambda: [step() for _ in range(STEPS)]))
        ratios.append(times[0] / times[1])
    print(statistics.median(ratios[1:]))


LOADS = {"a_core_free": CORES - 1, "three_processes_a_core": 3 * CORES}
MEASURES = {
    f"{name}_{load}": partial(busy, policy, processes)
    for load, processes in LOADS.items()
    for name, policy in (("spinning", "ACTIVE"), ("sleeping", "PASSIVE"))
}
