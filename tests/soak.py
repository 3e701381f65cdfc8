"""``make soak``: short jobs of every demo under random kills and damaged checkpoints, each compared with an undisturbed one.

``python -m tests.soak [minutes=15] [seed=0] [jobs=2] [only=<part of a recipe's name>]``. A disturbed job is killed (SIGKILL),
asked to stop (SIGTERM, SIGINT) or finds a byte of its last checkpoint flipped, at random instants, and started again by the
same command until it is finished. Weights, ``metrics.csv`` and the metrics of ``result.json`` must then be equal.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from experiments.sweeps.jobs import become, run_here
from models.io import read_tensors
from tests.experiments.tiny import RECIPES, tiny

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOST_STARTS = 8  # of one job; the last one is left alone
PATIENCE = 600  # seconds, after which a job counts as lost
COLUMNS = ("jobs", "starts", "killed", "stopped", "damaged", "equal", "different", "lost")
MEASURED = re.compile(r"_ms$|ms_per|per_s($|@|econd)|times_faster")  # times, which differ from run to run
START = threading.Lock()  # processes are forked one at a time


class Soak:
    def __init__(self, folder: Path, seed: int, recipes: Sequence[str]):
        self.folder, self.random = folder, random.Random(seed)
        self.options = {recipe: tiny(recipe) for recipe in recipes}  # before threads: Hydra composes one at a time
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(["experiments.sweeps.warm"])
        self.counts: dict[str, Counter] = {}
        self.failures: list[str] = []

    def job(self, recipe: str, number: int) -> None:
        """One undisturbed and one disturbed run of a recipe."""
        counts = self.counts.setdefault(recipe, Counter())
        counts["jobs"] += 1
        place = self.folder / f"{number}-{recipe.replace('/', '-')}"
        began = time.monotonic()
        if self._start(recipe, place, "whole", counts, None) != 0:
            return self._lost(recipe, place / "whole", counts)
        seconds = time.monotonic() - began
        for start in range(MOST_STARTS):
            wait = None if start == MOST_STARTS - 1 else self.random.uniform(0, 1.1 * seconds)
            if self._start(recipe, place, "disturbed", counts, wait) == 0:
                break
            self._damage(place / "disturbed", counts)
        else:
            return self._lost(recipe, place / "disturbed", counts)
        if problems := differences(place / "whole", place / "disturbed"):
            counts["different"] += 1
            self.failures.append(f"{recipe}: {place}: {', '.join(problems)}")
        else:
            counts["equal"] += 1
            shutil.rmtree(place)

    def _start(self, recipe: str, place: Path, name: str, counts: Counter, wait: float | None) -> int:
        """Start the run and disturb it after ``wait`` seconds (null: not at all); returns the exit code."""
        folder = place / name
        folder.mkdir(parents=True, exist_ok=True)
        overrides = [
            f"experiment={recipe}",
            self.options[recipe],
            "threads=1",
            f"paths.run='{folder}'",
            f"paths.data='{place / 'data'}'",
        ]
        with START:
            environment = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
            run = partial(run_here, overrides)
            process = self.processes.Process(target=become, args=(run, place / f"{name}.log", environment))
            process.start()
        counts["starts"] += 1
        process.join(wait)
        if process.exitcode is None and wait is not None:
            signum = self.random.choice(SIGNALS)
            counts["killed" if signum == signal.SIGKILL else "stopped"] += 1
            _send(process.pid, signum)
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode

    def _damage(self, run: Path, counts: Counter) -> None:
        """Now and then flip a byte of the newest checkpoint of a training that is not done."""
        stages = json.loads((run / "run.json").read_text())["stages"] if (run / "run.json").is_file() else {}
        file = run / "checkpoints" / "last" / self.random.choice(("weights.safetensors", "trainer.pt"))
        if self.random.random() < 0.25 and file.is_file() and "fit" not in stages:
            content = bytearray(file.read_bytes())
            content[self.random.randrange(len(content))] ^= 0xFF
            file.write_bytes(content)
            counts["damaged"] += 1

    def _lost(self, recipe: str, run: Path, counts: Counter) -> None:
        counts["lost"] += 1
        self.failures.append(f"{recipe}: not finished: {run.parent}")


def _send(pid: int, signum: int) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        pass  # it has just ended


def differences(left: Path, right: Path) -> list[str]:
    """What differs between two finished runs of one configuration."""
    problems = []
    for name in ("best", "last"):
        files = [run / "checkpoints" / name / "weights.safetensors" for run in (left, right)]
        if files[0].is_file() != files[1].is_file():
            problems.append(f"{name} exists in one of them")
        elif files[0].is_file():
            weights = [read_tensors(file) for file in files]
            if weights[0].keys() != weights[1].keys() or not all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0]):
                problems.append(f"weights of {name}")
    logs = [run / "metrics.csv" for run in (left, right)]
    if logs[0].is_file() and logs[0].read_bytes() != logs[1].read_bytes():
        problems.append("metrics.csv")
    metrics = [json.loads((run / "result.json").read_text())["metrics"] for run in (left, right)]
    exact = [json.dumps({k: v for k, v in of_run.items() if not MEASURED.search(k)}) for of_run in metrics]
    if metrics[0].keys() != metrics[1].keys() or exact[0] != exact[1]:
        problems.append("metrics of result.json")
    return problems


def main(arguments: list[str]) -> int:
    settings = {"minutes": "15", "seed": "0", "jobs": "2", "only": ""} | dict(a.partition("=")[::2] for a in arguments)
    recipes = [recipe for recipe in RECIPES if not recipe.startswith("paper/") and settings["only"] in recipe]
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak = Soak(folder, int(settings["seed"]), recipes)
    deadline = time.monotonic() + 60 * float(settings["minutes"])
    numbers = iter(range(1_000_000))

    def work() -> None:
        while time.monotonic() < deadline:
            number = next(numbers)
            recipe = recipes[number % len(recipes)]
            try:
                soak.job(recipe, number)
            except Exception as error:
                soak.failures.append(f"{recipe}: {error!r}")

    with ThreadPoolExecutor(int(settings["jobs"])) as pool:
        for done in [pool.submit(work) for _ in range(int(settings["jobs"]))]:
            done.result()
    table = Table(title=f"soak: {settings['minutes']} minutes, seed {settings['seed']}")
    for column in ("recipe", *COLUMNS):
        table.add_column(column, justify="left" if column == "recipe" else "right")
    total: Counter = Counter()
    for recipe, counts in sorted(soak.counts.items()):
        total.update(counts)
        table.add_row(recipe, *(str(counts[column]) for column in COLUMNS))
    table.add_row("all", *(str(total[column]) for column in COLUMNS))
    Console(width=120).print(table)
    print("\n".join(soak.failures) or "nothing was lost, nothing differs")
    if not soak.failures:
        shutil.rmtree(folder)
    return int(bool(soak.failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
