"""metrics.csv through stops, resumes and damage; Weights & Biases runs that are gone on with."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image

from experiments.evaluation.errors import read_table, write_table
from experiments.run import directory, loggers
from experiments.run.loggers import MetricsFile, read_metrics
from models.io import WriteError


def test_rows_after_the_checkpoint_are_cut_off(tmp_path):
    file = MetricsFile(tmp_path)
    file.log_metrics({"loss": 1.0, "epoch": 0}, step=0)
    size = file.sync()
    file.log_metrics({"loss": 0.5}, step=1)
    resumed = MetricsFile(tmp_path, size)
    resumed.log_metrics({"loss": 0.25}, step=1)
    assert read_metrics(tmp_path / "metrics.csv") == {"loss": ([0, 1], [1.0, 0.25])}
    MetricsFile(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "step,metric,value\n"


def test_a_metric_of_a_step_is_written_once(tmp_path):
    file = MetricsFile(tmp_path)
    for value in (1.0, 1.0):
        file.log_metrics({"loss": value}, step=3)
    file.log_metrics({"val/loss": 2.0, "loss": 1.0}, step=3)
    file.log_metrics({"loss": 4.0}, step=4)
    assert read_metrics(tmp_path / "metrics.csv") == {"loss": ([3, 4], [1.0, 4.0]), "val/loss": ([3], [2.0])}


def test_rows_that_never_reached_the_disk_leave_whole_rows(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,metric,value\n0,loss,1.0\n1,lo")
    MetricsFile(tmp_path, 1000)
    assert path.read_text() == "step,metric,value\n0,loss,1.0\n"


@pytest.mark.parametrize("tail", ["2,loss,0.", "2,lo", "\0\0\0", "x,y\n2,loss,oops\n", "2,loss,1,2\n"])
def test_torn_and_damaged_rows_are_left_out(tmp_path, tail):
    path = tmp_path / "metrics.csv"
    path.write_text("step,metric,value\n0,loss,1.0\n1,loss,nan\n" + tail)
    steps, values = read_metrics(path)["loss"]
    assert steps == [0, 1] and values[0] == 1.0 and values[1] != values[1]


def test_a_full_disk_is_explained():
    file = MetricsFile.__new__(MetricsFile)
    file.path, file.last = Path("/dev/full"), (-1, set())
    with pytest.raises(WriteError, match="/dev/full.*No space left"):
        file.log_metrics({"loss": 1.0}, step=0)


@pytest.mark.parametrize(
    "content, known",
    [
        ("machine api.wandb.ai login user password key\n", True),
        ("machine my-api.wandb.ai.example login user password key\n", False),
        ("# machine api.wandb.ai\n", False),
        ("machine", False),
        (None, False),
    ],
)
def test_the_key_of_wandb_in_netrc(tmp_path, monkeypatch, content, known):
    path = tmp_path / "netrc"
    if content is not None:
        path.write_text(content)
    monkeypatch.setenv("NETRC", str(path))
    assert loggers._in_netrc("api.wandb.ai") is known


@pytest.fixture
def wandb_run(tmp_path, monkeypatch):
    """Opens a run with an offline W&B run."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    node = {"_target_": "experiments.run.loggers.wandb_logger", "_partial_": True, "mode": "offline"}

    def opened(name):
        run = directory.Run(OmegaConf.create({"logger": {"wandb": node}}), tmp_path / name, [])
        run.dir.mkdir(exist_ok=True)
        run.record = {"experiment": "toy", "id": name}
        return run

    yield opened
    loggers.finish_wandb(succeeded=True)


def test_a_resumed_run_goes_on_with_its_wandb_run(wandb_run):
    for _ in range(2):
        (logger,) = loggers.configured(wandb_run("main"))
        assert logger.experiment.id == "main"
        loggers.finish_wandb(succeeded=False)


def test_final_results_go_to_the_wandb_run_of_their_run(wandb_run):
    """Also where a compared variant has opened its own since, or training was done in an earlier process."""
    main, variant = wandb_run("main"), wandb_run("variant")
    (logger,), _ = loggers.configured(main), loggers.configured(variant)
    loggers.log_wandb_results(main, {"test/accuracy": 1.0}, {}, {})
    assert logger.experiment.summary["test/accuracy"] == 1.0
    assert len(list((main.dir / "wandb").glob("offline-run-*-main"))) == 1
    loggers.finish_wandb(succeeded=True)
    loggers.log_wandb_results(main, {"test/accuracy": 2.0}, {}, {})
    assert loggers._WANDB_RUNS["main"].summary["test/accuracy"] == 2.0


def test_tables_of_errors_hold_their_images(wandb_run):
    main = wandb_run("main")
    row = {"text": "a red circle, small", "rank": 7, "own": lambda: Image.new("RGB", (600, 300), (200, 30, 30))}
    path = write_table(main.dir / "errors", "retrieval", [row, {**row, "rank": 4}])
    loggers.log_wandb_results(main, {}, {}, {"retrieval": path})
    assert [Image.open(cells[2]).size for cells in read_table(path)[1]] == [(512, 256)] * 2
    table = json.loads(next((main.dir / "wandb").rglob("retrieval*.table.json")).read_text())
    assert table["columns"] == ["text", "rank", "own"]
    assert [cells[:2] for cells in table["data"]] == [["a red circle, small", 7.0], ["a red circle, small", 4.0]]


def test_other_ranks_begin_no_wandb_run(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert loggers.wandb_logger(folder=tmp_path, name="toy", config={}, run_id="abc123", mode="offline") is None
