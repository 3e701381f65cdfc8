"""A user's own radiographs: a table, tar shards, reports and masks beside any set."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from datamodules.radiology import RadiologyDataModule
from datamodules.readers.radiograph_own import own_table, tar_shards
from datamodules.transforms.multi_crop import MultiCrop
from models.batch import SKIPPED, VOID_LABEL
from models.errors import UserError
from models.rad_dino import batch as keys
from tests.datamodules.conftest import image_bytes, write_tar


def module(root, layout, **more):
    crops = MultiCrop(global_size=16, local_size=8, local_count=1)
    options = {"patch_size": 4, "image_size": 16, "batch_size": 2, "num_workers": 0, "val_fraction": 0, "test_fraction": 0}
    data = RadiologyDataModule(str(root), crops, layout, **{**options, **more})
    data.setup()
    return data


def test_own_table_with_reports_and_masks(tmp_path):
    for name in ("a", "b"):
        Image.new("L", (20, 16), 90).save(tmp_path / f"{name}.png")
    lines = ["path,patient,split,sex,age,view,Effusion,Mass", "a.png,p1,train,F,63,AP,1,", "b.png,p1,test,,,,0,-1",
             "c.png,p2,held,M,1,PA,0,0", "d.png,p2,,M,1,PA,maybe,0"]  # fmt: skip
    (tmp_path / "images.csv").write_text("\n".join(lines))
    (tmp_path / "reports.csv").write_text('path,report\na.png,"Effusion, left."\n')
    (tmp_path / "masks" / "lungs").mkdir(parents=True)
    Image.fromarray(np.arange(20 * 16).reshape(16, 20) % 20 < 10).save(tmp_path / "masks" / "lungs" / "a.png")
    data = module(tmp_path, own_table)
    assert data.label_names == ["Effusion", "Mass"] and [len(data.splits[s]) for s in ("train", "test")] == [1, 1]
    assert data.skip_report()["total"] == 2 and data.structures == ["lungs"]
    (batch,) = data.evaluation_dataloader("train", masks=True)
    assert batch[keys.FINDINGS].tolist() == [[1, -1]] and batch[keys.REPORT] == ["Effusion, left."]
    assert batch[keys.METADATA].tolist() == [[0, 1, 63]]
    mask = batch[keys.STRUCTURE_MASKS]
    assert mask.shape == (1, 1, 16, 16) and mask[0, 0, :, :8].all() and not mask[0, 0, :, 8:].any()
    (batch,) = data.evaluation_dataloader("test", masks=True)
    assert (batch[keys.STRUCTURE_MASKS] == VOID_LABEL).all() and batch[keys.METADATA].isnan().all()


def test_own_table_without_paths(tmp_path):
    (tmp_path / "images.csv").write_text("file,split\na.png,train\n")
    with pytest.raises(UserError, match="'path' among them"):
        own_table(tmp_path)


def test_tar_shards_are_read_in_place(tmp_path):
    known = {"patient": "p1", "Effusion": 1, "sex": "M", "age": 40, "report": "Clear."}
    (tmp_path / "train").mkdir()
    write_tar(
        tmp_path / "train" / "0.tar", {"x.jpg": image_bytes(), "x.json": json.dumps(known).encode(), "y.jpg": image_bytes()}
    )
    write_tar(tmp_path / "train" / "1.tar", {"z.jpg": image_bytes(), "z.json": b"[", "w.png": b"no image"})
    table = tar_shards(tmp_path)
    assert table.paths == ["train/0.tar/x.jpg", "train/0.tar/y.jpg", "train/1.tar/w.png"] and set(table.splits) == {"train"}
    assert table.findings.tolist() == [[1], [-1], [-1]] and table.reports == ["Clear.", "", ""]
    assert [entry.reason.split(":")[0] for entry in table.skipped] == ["bad json"]
    assert table.metadata[0].tolist()[::2] == [1, 40] and math.isnan(table.metadata[0, 1])
    batches = list(module(tmp_path, tar_shards).evaluation_dataloader("train"))
    assert sum(len(batch[keys.FINDINGS]) for batch in batches) == 2
    assert [entry.reason.split(":")[0] for batch in batches for entry in batch[SKIPPED]] == ["corrupt image"]
