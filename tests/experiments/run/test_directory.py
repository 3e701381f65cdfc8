"""Run directories: who holds them, how a run is found again, and what damage it survives."""

import json
import os
import signal
import time

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from experiments.run import directory
from models.errors import UserError

CONFIG = {"name": "toy", "resume": "auto", "seed": 1, "datamodule": {"num_workers": 0, "root": "x"}, "threads": None}


@pytest.fixture
def open_run(tmp_path, monkeypatch):
    """Opens a run as the front door does, with changes of the configuration."""
    content = {"overrides": {"task": ["seed=1"]}, "runtime": {"choices": {"experiment": "toy"}}, "mode": "RUN"}
    monkeypatch.setattr(HydraConfig, "get", staticmethod(lambda: OmegaConf.create(content)))
    monkeypatch.setattr(directory, "_LOCKS", {})

    def opened(**changes):
        cfg = OmegaConf.create({**CONFIG, "paths": {"outputs": str(tmp_path), "run": None}})
        for key, value in changes.items():
            OmegaConf.update(cfg, key.replace("__", "."), value)
        return directory.open_run(cfg)

    return opened


def held_by_another_process(folder):
    """The id of a process that holds the lock until it is killed."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        directory._LOCKS.clear()
        directory.lock(folder)
        os.write(tell, b"x")
        time.sleep(60)
        os._exit(0)
    os.read(told, 1)
    return child


def test_a_run_that_is_alive_is_left_alone(open_run):
    run = open_run()
    run.set_status("failed")
    holder = held_by_another_process(run.dir)
    with pytest.raises(UserError, match=rf"in use by process {holder} on "):
        open_run(resume=str(run.dir))
    assert open_run().dir != run.dir
    os.kill(holder, signal.SIGKILL)
    os.waitid(os.P_PID, holder, os.WEXITED | os.WNOWAIT)  # a zombie: its number still exists
    assert open_run(resume=str(run.dir)).dir == run.dir
    os.waitpid(holder, 0)


def test_a_killed_run_is_found_by_its_lock_not_by_its_process_number(open_run):
    run = open_run()
    record = json.loads(run.path.read_text()) | {"pid": os.getppid()}  # some other process has got the number
    run.path.write_text(json.dumps(record))
    directory.unlock(run.dir)
    assert open_run().dir == run.dir


def test_two_runs_of_one_process_do_not_lock_each_other_out(open_run):
    first = open_run()
    assert open_run(resume=str(first.dir)).dir == first.dir
    assert open_run(resume=None).dir != first.dir


def test_a_finished_run_gives_its_directory_free(open_run):
    run = open_run()
    run.set_status("finished")
    holder = held_by_another_process(run.dir)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert open_run().dir != run.dir


@pytest.mark.parametrize("content", ["", "{", "[]", '{"identity": 1}', "\0\0\0"])
def test_a_damaged_record_blocks_no_other_run(open_run, content):
    damaged, sound = open_run(), open_run(resume=None)
    for run in (damaged, sound):
        directory.unlock(run.dir)
    damaged.path.write_text(content)
    assert open_run().dir == sound.dir
    with pytest.raises(UserError, match="run.json is damaged"):
        open_run(resume=str(damaged.dir))


def test_what_cannot_change_results_may_differ_on_resume(open_run):
    run = open_run()
    directory.unlock(run.dir)
    assert open_run(datamodule__num_workers=2, threads=1, description="again").dir == run.dir
    with pytest.raises(UserError, match=r"datamodule.root: x there, y now"):
        open_run(datamodule__root="y", datamodule__num_workers=2, resume=str(run.dir))


def test_the_identity_of_the_wandb_run_stays(open_run):
    run = open_run()
    directory.unlock(run.dir)
    assert open_run().record["id"] == run.record["id"]


def test_leftovers_of_a_killed_writer_are_removed(open_run):
    run = open_run()
    leftover = run.dir / "checkpoints" / ".last.01234567-1-01234567.tmp"
    leftover.mkdir(parents=True)
    (leftover / "weights.safetensors").touch()
    (run.dir / ".run.json.01234567-1-01234567.tmp").touch()
    directory.unlock(run.dir)
    open_run()
    assert sorted(path.name for path in run.dir.iterdir()) == ["checkpoints", "config.yaml", "run.json", "run.lock"]
    assert not list((run.dir / "checkpoints").iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes anywhere")
def test_a_folder_without_permission_is_named(open_run, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=str(tmp_path)):
        open_run()


TEXTS = [
    "",
    "plain",
    "a=b",
    "a b",
    "a,b",
    "it's",
    'say "x"',
    "back\\slash",
    "end\\",
    "\\'",
    "${seed}",
    "[a]",
    "{b}",
    "(c)",
    "%d",
]


@pytest.mark.parametrize("text", [*TEXTS, "ä", "/tmp/o'ut=1, [x]/${a}\\"])
def test_quoted_values_reach_hydra_as_they_are(text):
    override = OverridesParser.create().parse_override(f"resume={directory.quoted(text)}")
    assert OmegaConf.create({"seed": 1, "resume": override.value()}).resume == text


def test_jobs_of_a_sweep_never_share_a_directory(monkeypatch):
    monkeypatch.setattr(directory, "_COMMAND_LINE", ["run.py"])
    assert directory.slug(["root=a/b"]) != directory.slug(["root=a-b"])
    assert directory.slug(["root=a/b"]) == directory.slug(["root=a/b"])
    assert directory.slug(["seed=1", "lr=2"]) == "seed=1,lr=2"
