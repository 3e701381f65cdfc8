"""A user's own shards, with the faults that downloads have, go through the whole recipe."""

import json

from tests.datamodules.conftest import sample_files, write_tar
from tests.experiments.launch import launch, result, runs


def test_own_shards_with_faults(tmp_path):
    root = tmp_path / "pairs"
    for shard in range(2):
        files = {}
        for number in range(shard * 40, shard * 40 + 40):
            files |= sample_files(number)
        if shard == 0:
            files["000000003.jpg"] = files["000000003.jpg"][:40]  # a picture cut short
            files["000000004.txt"], files["000000004.json"] = b"", b"{}"  # no caption
        path = write_tar(root / f"{shard:05d}.tar", files)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])  # the last tar is cut short
    done = launch(
        tmp_path,
        "experiment=sail_dinov2", "datamodule=image_text/shards", f"datamodule.root={root}", "datamodule.num_workers=0",
        "datamodule.val_fraction=0.2", "datamodule.test_fraction=0.2", "debug=two_steps",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "sail_dinov2")
    found = result(run)
    assert "test/retrieval/t2i_recall@1" in found["metrics"]
    assert found["skipped"]["total"] >= 3
    told = json.dumps(found["skipped"])
    assert "truncated shard" in told
    notes = " ".join(found["notes"])
    assert "SKIPPED SAMPLES" in notes
    assert "no classes" in notes
    assert "FALLBACK ENCODER" in notes


def test_training_data_alone_trains_and_says_what_is_missing(tmp_path):
    root = tmp_path / "pairs"
    for folder, numbers in (("train", range(40)), ("validation", range(40, 60))):
        files = {}
        for number in numbers:
            files |= sample_files(number)
        write_tar(root / folder / "00000.tar", files)
    done = launch(
        tmp_path,
        "experiment=structure_dinov2", "debug=tiny/alignment/structure", "datamodule=image_text/shards", "subset=none",
        "evaluation=alignment/basic", "compare=null", f"datamodule.root={root}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "structure_dinov2")
    notes = " ".join(result(run)["notes"])
    assert "NOT EVALUATED: the data has neither" in notes
    assert "NO VAL SPLIT" in notes
    assert "FOLDERS NOT READ: validation" in notes
    assert "SIMULATED DATA" not in notes
    assert result(run)["metrics"] == {}
    assert (run / "checkpoints" / "last").is_dir()
    for text in ("NO VAL SPLIT", "FALLBACK ENCODER"):
        assert done.stderr.count(text) <= 1
