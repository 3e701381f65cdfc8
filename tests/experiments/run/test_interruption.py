"""Signals to real processes: several ranks agree on the step in which they stop, reading workers do not end a run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.run import interruption
from experiments.run.loggers import read_metrics
from tests.experiments.launch import ROOT
from tests.experiments.run.toy import assert_equal_runs, train

SECONDS = 120  # until a run that hangs is killed


def start(folder, *options):
    for marker in folder.glob("started-*"):
        marker.unlink()
    command = [sys.executable, "-m", "tests.experiments.run.toy", str(folder), *options]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True)


def end(process):
    try:
        _, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail("the run hangs")
    return process.returncode, errors


def finish(folder, *options):
    code, errors = end(start(folder, *options))
    assert code == 0, errors


def wait_for_steps(folder, ranks=1):
    deadline = time.monotonic() + SECONDS
    while len(list(folder.glob("started-*"))) < ranks:
        assert time.monotonic() < deadline, "the run does not start"
        time.sleep(0.02)
    time.sleep(0.3)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_ranks_stop_together_and_go_on_equal(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "a = b, 'c'"
    whole.mkdir(), parts.mkdir()
    two = ("devices=2", "epochs=12")
    finish(whole, *two)
    losses = [float((whole / f"loss-{rank}").read_text()) for rank in range(2)]
    assert losses[0] != losses[1]
    assert read_metrics(whole / "metrics.csv")["train/loss"][1][0] == pytest.approx(sum(losses) / 2, rel=1e-6)
    for target in ("main", "child", "group"):
        process = start(parts, *two, "sleep=0.1")
        wait_for_steps(parts, ranks=2)
        if target == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            os.kill(process.pid if target == "main" else children(process.pid)[0], signal.SIGTERM)
        code, errors = end(process)
        assert code == 128 + signal.SIGTERM, f"{target}: {errors}"
        assert {path.name: path.read_text() for path in parts.glob("ended-*")} == {"ended-0": "143", "ended-1": "0"}, target
    finish(parts, *two)
    assert_equal_runs(whole, parts)


def test_a_signal_to_the_group_leaves_reading_workers_alive(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    parts.mkdir()
    process = start(parts, "workers=2", "sleep=0.1")
    wait_for_steps(parts)
    os.killpg(process.pid, signal.SIGTERM)
    code, errors = end(process)
    assert code == 143, errors
    train(parts)
    train(whole)
    assert_equal_runs(whole, parts)


def test_an_error_after_the_signal_is_an_interruption():
    with pytest.raises(interruption.Interrupted), interruption.listening(), interruption.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        raise RuntimeError("DataLoader worker is killed by signal")
    with pytest.raises(RuntimeError), interruption.listening(), interruption.deferred():
        raise RuntimeError


def test_outside_of_training_a_signal_stops_at_once():
    with pytest.raises(interruption.Interrupted) as stop, interruption.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert stop.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
