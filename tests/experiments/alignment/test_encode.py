"""The stage encode: several processes write what one writes, and pre-encoded features need no encoder."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from datamodules.features.store import FeatureStore, StoreError
from experiments.alignment.pipeline import verify_once
from experiments.run.directory import Run
from tests.datamodules.readers.layouts import sail_chunks
from tests.experiments.launch import launch, result, runs

TINY = ("datamodule.num_workers=0", "datamodule.simulate.train=70", "datamodule.simulate.val=8", "datamodule.simulate.test=8")
KEEP = ("encoder.keep.vision=[tokens,pooled]", "encoder.keep.text=[pooled,tokens,layers]", "encoder.text.layers=true")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Bytes of every store, by number of processes and store."""
    found = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(str(processes))
        done = launch(
            folder, "experiment=sail_dinov2", "stages=[prepare,encode]", *TINY, *KEEP, "encoder.batch_size=8",
            f"paths.features={folder}/features", "trainer.accelerator=cpu", f"trainer.devices={processes}", "threads=1",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (run,) = runs(folder, "sail_dinov2")
        assert json.loads((run / "run.json").read_text())["status"] == "finished" and not (run / "error.log").exists()
        stores = sorted((folder / "features").glob("[!.]*"))
        assert all(json.loads((store / "manifest.json").read_text())["complete"] for store in stores)
        found[processes] = {store.name: (store / "rows.bin").read_bytes() for store in stores}
    return found


def test_two_processes_write_what_one_writes(written):
    assert len(written[1]) == 3 * 5  # three splits, five kinds
    assert written[2] == written[1]
    assert any(any(rows) for rows in written[1].values())


def test_pre_encoded_chunks_are_trained_on_as_they_are(tmp_path):
    sail_chunks(tmp_path / "chunks")
    done = launch(
        tmp_path, "experiment=sail_dinov2", "datamodule=features/sail_chunks", f"datamodule.root={tmp_path}/chunks",
        "debug=two_steps",
        "datamodule.val_fraction=0.1", "datamodule.test_fraction=0.1", "features.batch_size=64", "features.extra_caption=next",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = runs(tmp_path, "sail_dinov2")
    found = result(run)
    assert "test/retrieval/t2i_recall@1" in found["metrics"]
    assert "FALLBACK" not in " ".join(found["notes"])  # no encoder was asked for


def test_a_run_verifies_a_store_once_and_stops_at_a_damaged_one(tmp_path, monkeypatch):
    store = FeatureStore.create_or_resume(tmp_path / "store", {}, rows=4, dim=3)
    store.write(np.arange(4), torch.ones(4, 3))
    store.finish()
    run = Run(OmegaConf.create({}), tmp_path, [])
    verify_once(run, store)
    rows = bytearray((tmp_path / "store/rows.bin").read_bytes())
    rows[7] ^= 4
    (tmp_path / "store/rows.bin").write_bytes(rows)
    verify_once(run, store)
    with pytest.raises(StoreError, match=r"rows.bin is damaged: bytes 0 to 24 \(rows 0 to 3\)"):
        verify_once(Run(OmegaConf.create({}), tmp_path, []), store)
