"""Radiographs from the files of chest X-ray sets to batches of crops and masks."""

import csv
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.radiology import RadiologyDataModule
from datamodules.readers.base import BadSample
from datamodules.readers.dicom import open_radiograph
from datamodules.readers.radiographs import Entry, as_table, assign_splits, image_folder, nih_cxr14
from datamodules.simulated.radiographs import FINDINGS, nih_phantoms
from datamodules.transforms.multi_crop import MultiCrop, gaussian_blur
from models.batch import IMAGE, INDEX, SKIPPED, VOID_LABEL
from models.errors import UserError
from models.rad_dino import batch as keys
from models.rad_dino.masking import described

SMALL = {"global_size": 32, "local_size": 16, "local_count": 3}


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return nih_phantoms(str(tmp_path_factory.mktemp("set")), train=40, val=12, test=20, image_size=32, prevalence=0.5)


def module(root, **more):
    options = {"patch_size": 8, "image_size": 32, "batch_size": 5, "eval_batch_size": 7, "num_workers": 0}
    data = RadiologyDataModule(str(root), MultiCrop(**SMALL), **{**options, **more})
    data.prepare_data()
    data.setup()
    return data


def test_phantoms_are_read_as_chestxray14(phantoms):
    data = module(phantoms)
    assert len(data.splits["test"]) == 20 and len(data.splits["train"]) + len(data.splits["val"]) == 52
    patients = {split: set(dataset.patients) for split, dataset in data.splits.items()}
    assert not patients["train"] & patients["val"] and not (patients["train"] | patients["val"]) & patients["test"]
    with open(phantoms / "Data_Entry_2017.csv") as file:
        labels = {row["Image Index"]: row["Finding Labels"] for row in csv.DictReader(file)}
    dataset = data.splits["train"]
    for row in range(5):
        named = {name for name, value in zip(data.label_names, dataset.findings[row], strict=True) if value}
        assert "|".join(sorted(named)) == labels[dataset.paths[row].split("/")[-1]].replace("No Finding", "")
        assert named <= set(FINDINGS)


def test_masks_as_run_lengths(tmp_path):
    for name in "abcd":
        path = tmp_path / "train" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (8, 4)).save(path)
    runs = {"train/a.png": np.array([[0, 12]]), "train/b.png": np.zeros((0, 2), int), "train/c.png": np.array([[30, 3]])}
    data = module(tmp_path, layout=lambda root: image_folder(root)._replace(runs={"ptx": runs}), patch_size=8, max_skipped=1.0)
    assert data.structures == ["ptx"]
    (batch,) = data.evaluation_dataloader("train", crops=False, masks=True)
    assert [(entry.key, entry.reason.split(":")[0]) for entry in batch[SKIPPED]] == [("train/c.png", "masks")]
    of_a, of_b, of_d = batch[keys.STRUCTURE_MASKS][:, 0]
    # The image is cut to its middle 4 x 4 before it is enlarged; its first three columns of 8 are white.
    assert of_a[:, :8].all() and not of_a[:, 8:].any() and not of_b.any() and (of_d == VOID_LABEL).all()


def test_batches(phantoms):
    data = module(phantoms)
    batch = next(iter(data.train_dataloader()))
    assert batch[keys.GLOBAL_CROPS].shape == (5, 2, 3, 32, 32) and batch[keys.LOCAL_CROPS].shape == (5, 3, 3, 16, 16)
    assert batch[keys.MASKS].shape == (5, 2, 16) and IMAGE not in batch and batch[SKIPPED] == []
    masks = described(batch[keys.MASKS].transpose(0, 1).flatten(0, 1))
    assert torch.equal(masks.indices, batch[keys.MASK_INDICES]) and torch.equal(masks.weights, batch[keys.MASK_WEIGHTS])
    again = next(iter(module(phantoms).train_dataloader()))
    assert all(torch.equal(batch[name], again[name]) for name in (keys.GLOBAL_CROPS, keys.LOCAL_CROPS, keys.MASKS, INDEX))
    held_out = [b for b in data.evaluation_dataloader("test")]
    assert [len(b[INDEX]) for b in held_out] == [7, 7, 6] and keys.GLOBAL_CROPS in held_out[0]
    assert keys.GLOBAL_CROPS not in next(iter(data.evaluation_dataloader("test", crops=False)))
    assert set(data.provides) <= batch.keys()


def test_a_damaged_file_is_counted(phantoms, tmp_path):
    import shutil

    root = tmp_path / "set"
    shutil.copytree(phantoms, root)
    next(iter((root / "images").glob("00000000_*.png"))).write_bytes(b"no image")
    data = module(root)
    skipped = [entry for batch in data.train_dataloader() for entry in batch[SKIPPED]]
    skipped += [entry for batch in data.evaluation_dataloader("val") for entry in batch[SKIPPED]]
    assert len(skipped) == 1 and skipped[0].reason.startswith("corrupt image")


def test_rows_that_cannot_be_used_are_counted(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "images" / "a.png")
    rows = ["a.png,Effusion|Mass,1", "b.png,No Finding,2", "a.png,Flu,3"]
    (tmp_path / "Data_Entry_2017.csv").write_text("\n".join(["Image Index,Finding Labels,Patient ID", *rows]))
    table = nih_cxr14(tmp_path)
    assert table.paths == ["images/a.png"] and int(table.findings.sum()) == 2
    assert [entry.reason.split(":")[0] for entry in table.skipped] == ["missing image", "unknown finding"]


def test_a_patient_is_in_one_split():
    patients = [str(number // 3) for number in range(300)]
    stated = ["test" if number % 50 == 0 else "" for number in range(300)]
    table = as_table([Entry("", patient, (), split) for patient, split in zip(patients, stated, strict=True)], ())
    splits = assign_splits(table, 0.2, 0.3)
    assert all(len({split for p, split in zip(patients, splits, strict=True) if p == patient}) == 1 for patient in patients)
    assert splits.count("test") == 18 and 20 < splits.count("val") < 100


def test_folders_of_images(tmp_path):
    for name in ("train/a.png", "test/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / name)
    table = image_folder(tmp_path)
    assert table.splits == ["test", "train"] and table.findings.shape == (2, 0)
    with pytest.raises(UserError, match="holds no image"):
        image_folder(tmp_path / "nowhere")


def test_sixteen_bit_png_keeps_its_range(tmp_path):
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    image = open_radiograph(tmp_path / "deep.png")
    assert image.mode == "L" and image.getextrema() == (0, 255)
    assert np.abs(np.asarray(image) - values / 257).max() <= 0.5


def test_dicom_without_pydicom_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    (tmp_path / "a.dcm").write_bytes(b"0" * 200)
    with pytest.raises(UserError, match="pip install pydicom"):
        open_radiograph(tmp_path / "a.dcm")


def test_dicom(tmp_path):
    import pydicom

    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 50
    for interpretation, first in (("MONOCHROME1", 255), ("MONOCHROME2", 0)):
        data = pydicom.Dataset()
        data.file_meta = pydicom.dataset.FileMetaDataset()
        data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        data.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
        data.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        data.Rows = data.Columns = 8
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation, data.SamplesPerPixel = 16, 12, 11, 0, 1
        data.PhotometricInterpretation, data.PixelData = interpretation, values.tobytes()
        data.RescaleSlope, data.RescaleIntercept = 2, -100
        data.WindowCenter, data.WindowWidth = 1000, 500
        file = tmp_path / f"{interpretation}.dcm"
        data.save_as(file, enforce_file_format=True)
        pixels = np.asarray(open_radiograph(file))
        assert pixels.dtype == np.uint8 and pixels[0, 0] == first and pixels[-1, -1] == 255 - first
        assert len(np.unique(np.asarray(open_radiograph(file, window=True)))) < len(np.unique(pixels))
    content = file.read_bytes()
    file.write_bytes(content[:-60])
    with pytest.raises(BadSample, match="corrupt image"):
        open_radiograph(file)
    data.Rows = data.Columns = 60_000  # a claim: the file stays small
    data.save_as(file)
    with pytest.raises(BadSample, match="image too large"):
        open_radiograph(file)


def test_real_dicom_files_are_read_and_damaged_ones_counted(tmp_path):
    """The scans that pydicom brings along: CT and MR, both byte orders, run-length and JPEG 2000, dose frames, a plan."""
    from pydicom.data import get_testdata_file

    mr = ("MR_small", "MR_small_bigendian", "MR_small_implicit", "MR_small_RLE", "MR_small_jp2klossless")
    damaged = ("MR_truncated", "rtplan")
    for name in (*mr, "CT_small", "rtdose", *damaged):
        path = tmp_path / "train" / f"{name}.dcm"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(Path(get_testdata_file(f"{name}.dcm", download=False)).read_bytes())
    data = module(tmp_path, layout=image_folder, max_skipped=1.0)
    batches = list(data.evaluation_dataloader("train", crops=False))
    read = {
        data.splits["train"].paths[row]: image
        for batch in batches
        for row, image in zip(batch[INDEX], batch[IMAGE], strict=True)
    }
    assert {entry.key for batch in batches for entry in batch[SKIPPED]} == {f"train/{name}.dcm" for name in damaged}
    assert len(read) == 7 and all(float(image.std()) > 0 for image in read.values())
    for name in mr[1:]:
        assert torch.equal(read[f"train/{name}.dcm"], read["train/MR_small.dcm"]), name
    stored = np.frombuffer(
        (tmp_path / "train" / "CT_small.dcm").read_bytes()[-128 * 128 * 2 - 138 : -138], "<i2"
    )  # padding behind
    pixels = np.asarray(open_radiograph(tmp_path / "train" / "CT_small.dcm")).ravel().astype(float)
    scaled = (stored - stored.min()) * (255 / (stored.max() - stored.min()))
    assert np.abs(pixels - scaled).max() <= 0.5


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_official_blur_inverts_its_probabilities(mode):
    crops = MultiCrop(**SMALL, official_blur=True)
    assert crops.blur == pytest.approx((0.0, 0.9, 0.5)) and MultiCrop().blur == (1.0, 0.1, 0.5)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 40, 3), dtype=np.uint8)).convert(mode)
    views = crops(image, np.random.default_rng(1))
    again = crops(image, np.random.default_rng(1))
    assert all(torch.equal(a, b) for a, b in zip(views.global_, again.global_, strict=True))
    assert views.global_[0].shape == (3, 32, 32) and views.local.shape == (3, 3, 16, 16)
    assert MultiCrop(**{**SMALL, "local_count": 0})(image, np.random.default_rng(1)).local.shape == (0, 3, 16, 16)


def test_blur_is_torchvisions():
    from torchvision.transforms.functional import gaussian_blur as reference

    pixels = np.random.default_rng(0).uniform(0, 255, (20, 24, 3)).astype(np.float32)
    expected = reference(torch.from_numpy(pixels).permute(2, 0, 1), [9, 9], [1.3, 1.3]).permute(1, 2, 0)
    torch.testing.assert_close(torch.from_numpy(gaussian_blur(pixels, 1.3)), expected, rtol=1e-4, atol=1e-3)


def test_crops_that_are_no_multiple_of_the_patch_are_refused(phantoms):
    with pytest.raises(UserError, match="no multiple"):
        module(phantoms, patch_size=5)


def test_simulated_set_is_written_once(tmp_path):
    write = partial(nih_phantoms, train=6, val=2, test=4, image_size=32)
    data = module(tmp_path / "simulated", simulate=write)
    assert data.simulated and module(tmp_path / "simulated", simulate=write).folder() == data.folder()
    assert len(data.splits["test"]) == 4
