"""The table over the jobs of a sweep: seeds are repetitions, unfinished jobs do not count."""

import json

import pytest

from experiments.sweeps.table import best_job, command_of, read_jobs, summarise, summarise_pairs


def job(folder, status, value, *overrides):
    place = folder / "-".join(overrides).replace("/", "-")
    place.mkdir()
    (place / "run.json").write_text(json.dumps({"status": status, "overrides": ["experiment=x", *overrides]}))
    (place / "result.json").write_text(json.dumps({"metrics": {"test/top1": value}}))


def test_seeds_are_averaged_and_axes_found(tmp_path, capsys):
    for pairs, kind, values in (("16", "a", (1, 3)), ("128", "a", (5, 7)), ("16", "b", (2, 2)), ("128", "b", (9, 9))):
        for seed, value in enumerate(values):
            job(tmp_path, "finished", value, f"pairs={pairs}", f"kind={kind}", f"seed={seed}")
    job(tmp_path, "failed", 100, "pairs=16", "kind=a", "seed=9")
    rows = summarise(tmp_path)
    assert [(r["kind"], r["pairs"], r["jobs"], r["test/top1 mean"]) for r in rows] == [
        ("a", "16", 2, 2), ("a", "128", 2, 6), ("b", "16", 2, 2), ("b", "128", 2, 9),
    ]  # fmt: skip
    assert rows[0]["test/top1 std"] == pytest.approx(2**0.5)
    assert (tmp_path / "sweep_test_top1.png").stat().st_size > 1000
    assert (tmp_path / "sweep.csv").read_text().splitlines()[0] == "kind,pairs,jobs,test/top1 mean,test/top1 std"
    assert "2.00 ± 1.41" in capsys.readouterr().out


def test_pairs_of_jobs_with_one_seed_are_subtracted(tmp_path, capsys):
    """The seeds differ by much, what the method changes differs by little."""
    for pairs, kind, values in (("16", "b", (10, 60)), ("16", "a", (11, 63)), ("128", "b", (5, 5)), ("128", "a", (4, 4))):
        for seed, value in enumerate(values):
            job(tmp_path, "finished", value, f"pairs={pairs}", f"kind={kind}", f"seed={seed}")
    job(tmp_path, "finished", 100, "pairs=16", "kind=a", "seed=9")  # has no partner
    rows = summarise_pairs(tmp_path, ["test/top1"], "kind", "b")
    assert [(r["pairs"], r["kind"], r["jobs"], r["test/top1 mean"]) for r in rows] == [("16", "a", 2, 2), ("128", "a", 2, -1)]
    assert rows[0]["test/top1 std"] == pytest.approx(2**0.5)
    assert "+2.00 ± 1.41" in capsys.readouterr().out
    assert (tmp_path / "sweep_paired.csv").read_text().splitlines()[0] == "kind,pairs,jobs,test/top1 mean,test/top1 std"


def test_a_job_that_was_done_twice_counts_once(tmp_path):
    for overrides in (["pairs=16"], ["pairs=16", "seed=42"]):
        job(tmp_path, "finished", 1, *overrides)
        file = tmp_path / "-".join(overrides) / "run.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"identity": "same"}))
    (row,) = summarise(tmp_path)
    assert row["jobs"] == 1


def test_every_metric_is_written_and_one_of_each_task_is_shown(tmp_path, capsys):
    metrics = {f"test/{task}/{name}": 1.0 for task in ("zeroshot", "retrieval") for name in ("first", "second", "third")}
    for pairs in ("16", "32"):
        job(tmp_path, "finished", 1, f"pairs={pairs}")
        (tmp_path / f"pairs={pairs}" / "result.json").write_text(json.dumps({"metrics": metrics}))
    summarise(tmp_path, failed={"pairs=64": "no such pairs"})
    assert all(f"{name} mean" in (tmp_path / "sweep.csv").read_text() for name in metrics)
    shown = capsys.readouterr().out
    assert "test/zeroshot/first" in shown and "test/retrieval/first" in shown and "second" not in shown
    assert json.loads((tmp_path / "sweep.json").read_text())[-1] == {"overrides": "pairs=64", "failed": "no such pairs"}


def test_the_best_job_is_that_of_the_best_mean_over_seeds(tmp_path):
    for pairs, values in (("16", (0, 9)), ("128", (6, 5))):
        for seed, value in enumerate(values):
            job(tmp_path, "finished", value, f"pairs={pairs}", f"seed={seed}", "sweep=a/b", "optimize=test/top1")
    jobs = read_jobs(tmp_path)
    best = best_job(jobs, "test/top1", "max")
    assert best.settings == {"pairs": "128", "seed": "0"}
    assert best_job(jobs, "test/top1", "min").settings == {"pairs": "16", "seed": "0"}
    assert best_job(jobs, "test/other", "max") is None
    assert command_of(best) == (
        f"python run.py experiment=x pairs=128 seed=0 sweep=a/b hydra.mode=RUN \"checkpoint='{best.folder}'\" "
        "'stages=[evaluate,report]'"
    )
