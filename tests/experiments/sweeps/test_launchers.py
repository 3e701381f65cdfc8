"""Sweeps whose jobs are processes of their own: the pool of this machine, SLURM through submitit's local executor, a search."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from experiments.config.resolvers import register_resolvers
from experiments.plugins.hydra_plugins.optuna_search import OptunaSearch
from experiments.sweeps.definition import check_definition, definition_of
from experiments.sweeps.jobs import modules_of
from experiments.sweeps.search import distribution_of, open_study
from experiments.sweeps.wandb import definition
from models.errors import UserError
from tests.experiments.launch import ROOT, command, environment
from tests.experiments.launch import launch_cold as launch

TINY = ("experiment=sail_dinov2", "debug=tiny/alignment/default", "compare=null")
POOL = ("--multirun", *TINY, "hydra/launcher=local_pool", "hydra.launcher.jobs=2")


def statuses(folder):
    files = sorted(folder.glob("outputs/sweeps/*/*/*/run.json"))
    return {file.parent.name: json.loads(file.read_text())["status"] for file in files}


@pytest.mark.slow
def test_a_pool_runs_jobs_side_by_side_names_failures_and_skips_what_is_finished(tmp_path):
    sweep = (*POOL, "sweep_name=lr", "optimizer.lr=-1,1e-3", "optimize=test/zeroshot/top1")
    first = launch(tmp_path, *sweep)
    assert first.returncode == 2, first.stdout + first.stderr
    assert "jobs: 1 done, 0 skipped, 1 failed" in first.stdout and "best by test/zeroshot/top1" in first.stdout
    assert "lr=-1" in first.stdout.split("failed: ", 1)[1] and "++" not in first.stdout + first.stderr
    finished = tmp_path / "outputs/sweeps/sail_dinov2/lr/optimizer.lr=0.001"
    assert json.loads((finished / "run.json").read_text())["overrides"] == [
        *TINY, "sweep_name=lr", "++optimizer.lr=0.001", "optimize=test/zeroshot/top1", *places(tmp_path),
    ]  # fmt: skip
    before = (finished / "result.json").stat().st_mtime_ns
    again = launch(tmp_path, *POOL, "sweep_name=lr", "optimizer.lr=1e-3,1e-4", "optimize=test/zeroshot/top1")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "jobs: 1 done, 1 skipped, 0 failed" in again.stdout
    assert (finished / "result.json").stat().st_mtime_ns == before
    other = launch(tmp_path, *POOL, "sweep_name=lr", "optimizer.lr=1e-3,1e-4", "trainer.max_epochs=3")
    assert other.returncode == 2 and "holds another sweep" in other.stderr and "trainer.max_epochs" in other.stderr


def places(folder):
    return [f"++{override}" for override in command(folder)[2:]]


@pytest.mark.slow
def test_ctrl_c_stops_every_job_of_a_pool_with_a_checkpoint(tmp_path):
    line = command(
        tmp_path, *POOL, "sweep_name=long", "seed=1,2", "trainer.max_epochs=5000", "trainer.max_steps=-1",
        "callbacks.checkpoints.monitor=null",
    )  # fmt: skip
    process = subprocess.Popen(line, cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True)
    jobs = [tmp_path / f"outputs/sweeps/sail_dinov2/long/seed={seed}" for seed in (1, 2)]
    deadline = time.monotonic() + 240
    while not all((job / "metrics.csv").is_file() and (job / "metrics.csv").stat().st_size > 100 for job in jobs):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert set(statuses(tmp_path).values()) == {"interrupted"}
    assert all((job / "checkpoints/last/weights.safetensors").is_file() for job in jobs)
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listing


@pytest.mark.slow
def test_slurm_jobs_go_on_after_their_time_is_over(tmp_path):
    sweep = (
        "--multirun", *TINY, "sweep_name=cluster", "seed=1,2", "hydra/launcher=slurm", "hydra.launcher.cluster=local",
        "hydra.launcher.gpus_per_node=0", "hydra.launcher.seconds_between_looks=0.5",
    )  # fmt: skip
    done = launch(tmp_path, *sweep)
    assert done.returncode == 0, done.stdout + done.stderr
    assert statuses(tmp_path) == {"seed=1": "finished", "seed=2": "finished"}
    again = launch(tmp_path, *sweep)
    assert again.returncode == 0 and "jobs: 0 done, 2 skipped, 0 failed" in again.stdout


@pytest.mark.slow
def test_a_warned_job_saves_and_asks_to_be_queued_again(tmp_path, monkeypatch):
    """As SLURM does before the end of the time: SIGUSR1, and ``scontrol requeue`` of the same job."""
    asked = tmp_path / "asked"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $@ > {asked}\n")
    program.chmod(0o755)
    line = command(tmp_path, *TINY, "trainer.max_epochs=5000", "trainer.max_steps=-1", "callbacks.checkpoints.monitor=null")
    given = environment(tmp_path) | {"SLURM_JOB_ID": "77", "PATH": f"{program.parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(line, cwd=tmp_path, env=given, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not [file for file in tmp_path.glob("outputs/sail_dinov2/*/metrics.csv") if file.stat().st_size > 100]:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGUSR1
    assert asked.read_text().split() == ["requeue", "77"]
    (run,) = tmp_path.glob("outputs/sail_dinov2/*/")
    assert (run / "checkpoints/last/weights.safetensors").is_file()


@pytest.mark.slow
def test_a_search_persists_counts_failures_and_goes_on(tmp_path):
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = (
        "--multirun", *TINY, "sweep_name=search", "hydra/sweeper=optuna", "optimize=test/zeroshot/top1",
        "optimizer.lr=-1,1e-3,1e-4", "hydra.sweeper.sampler=grid", "hydra.sweeper.pruner=median",
    )  # fmt: skip
    first = launch(tmp_path, *search, "hydra.sweeper.trials=2")
    assert "search: 2 trials" in first.stdout, first.stdout + first.stderr
    second = launch(tmp_path, *search, "hydra.sweeper.trials=9")
    assert "search: 3 trials" in second.stdout, second.stdout + second.stderr  # the grid has no more
    folder = tmp_path / "outputs/sweeps/sail_dinov2/search"
    study = open_study(str(folder / "search.journal"), "search")
    by_rate = {trial.params["++optimizer.lr"]: trial for trial in study.trials}
    assert by_rate["-1"].state.name == "FAIL" and "lr" in by_rate["-1"].user_attrs["failed"]
    finished = by_rate["0.001"]
    result = json.loads((folder / "optimizer.lr=0.001" / "result.json").read_text())
    assert finished.values == [result["metrics"]["test/zeroshot/top1"]]
    assert finished.intermediate_values  # the pruner was told of every validation
    assert "best: trial" in second.stdout and (folder / "search_history.png").is_file()


def test_a_trial_equal_to_a_running_one_is_known():
    """Both would train in one directory."""
    search = OptunaSearch()
    search.study = optuna.create_study()
    space = {"layers": CategoricalDistribution(["1"])}
    first, second = search.study.ask(space), search.study.ask(space)
    assert search._equal_to(first) is None and search._equal_to(second) == first.number
    search.study.tell(first, 1.0)
    assert search._equal_to(second) is None


@pytest.mark.ddp
def test_ranks_of_torchrun_share_one_run(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    line = [*torchrun, *command(tmp_path, *TINY, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")[1:]]
    done = subprocess.run(
        line, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    (run,) = tmp_path.glob("outputs/sail_dinov2/*/")
    assert json.loads((run / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("override", "distribution"),
    [
        ("lr=tag(log,interval(1e-5,1e-2))", FloatDistribution(1e-5, 1e-2, log=True)),
        ("lr=interval(0,1.5)", FloatDistribution(0, 1.5)),
        ("layers=int(interval(1,4))", IntDistribution(1, 4)),
        ("width=64,128", CategoricalDistribution(["64", "128"])),
        ("layers=range(1,4)", CategoricalDistribution(["1", "2", "3"])),
    ],
)
def test_what_is_searched(override, distribution):
    (parsed,) = OverridesParser.create().parse_overrides([override])
    assert distribution_of(parsed) == distribution


def test_jobs_are_forked_from_a_process_with_the_modules_of_their_targets():
    """Also what their functions import when they are called, and nothing that a foreign configuration names."""
    targets = ["experiments.config.listing.main", "experiments.run.loggers.Nothing", "antigravity.x"]
    modules = modules_of(OmegaConf.create({"parts": [{"_target_": target} for target in targets]}))
    assert modules[:2] == ["experiments.config.listing", "experiments.run.loggers"]
    assert "wandb" in modules and "antigravity" not in modules


@pytest.mark.parametrize(("overrides", "name"), [([], r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"), (["sweep_name=lr"], "lr")])
def test_a_sweep_without_a_name_has_a_folder_of_its_own(overrides, name):
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["experiment=sail_dinov2", *overrides], return_hydra_config=True)
    assert re.fullmatch(name, Path(config.hydra.sweep.dir).name)


def definition_config(folder, *overrides):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("config", overrides=["experiment=sail_dinov2"], return_hydra_config=True)
    config.hydra.overrides.task = list(overrides)
    config.hydra.sweep.dir = str(folder)
    return config


def test_a_folder_holds_one_sweep_to_which_values_may_be_added(tmp_path):
    check_definition(definition_config(tmp_path, "experiment=sail_dinov2", "seed=1,2", "optimize=test/a", "++paths.data=/a"))
    check_definition(definition_config(tmp_path, "experiment=sail_dinov2", "seed=3,4", "++paths.data=/b"))
    assert definition_of(definition_config(tmp_path, "a=1,2", "b=3")) == {"a": "varied", "b": "3"}
    for others in (["seed=1,2"], ["experiment=sail_dinov2", "seed=1,2", "debug=x"], ["experiment=sail_dinov2", "++a.b=1,2"]):
        with pytest.raises(UserError, match="holds another sweep"):
            check_definition(definition_config(tmp_path, *others))


def test_a_wandb_sweep_calls_run_with_the_parameters_it_draws():
    written = definition(
        ["experiment=sail_dinov2", "projector=linear,mlp", "optimizer.lr=tag(log,interval(1e-5,1e-2))", "optimize=test/a"]
    )
    assert written["method"] == "bayes" and written["metric"] == {"name": "test/a", "goal": "maximize"}
    assert written["parameters"] == {
        "projector": {"values": ["linear", "mlp"]},
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
    }
    assert written["command"][:3] == ["python", "run.py", "experiment=sail_dinov2"]
    named = definition(["experiment=hammer_dgm4", "sweep=hammer/ablation"])
    assert named["method"] == "grid" and "hammer/text_only" in named["parameters"]["module"]["values"]
    with pytest.raises(UserError, match="nothing to sweep"):
        definition(["experiment=sail_dinov2", "optimize=test/a"])
