"""Layouts of chest X-ray sets on small files of exactly that form."""

import gzip

import numpy as np
import pytest

from datamodules.readers import radiograph_sets as sets
from datamodules.readers.base import BadSample
from datamodules.readers.run_lengths import mask_of_runs
from models.errors import UserError


def write(path, *lines, zipped=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())


def test_mimic_cxr_jpg(tmp_path):
    names = ",".join(sets.CHEXPERT_FINDINGS)
    write(tmp_path / "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split", "d1,50,10000032,train",
          "d2,51,10000033,validate", "d3,51,10000033,validate", zipped=True)  # fmt: skip
    write(tmp_path / "mimic-cxr-2.0.0-chexpert.csv.gz", f"subject_id,study_id,{names}", "10000032,50,,,1.0,-1.0" + "," * 10,
          zipped=True)  # fmt: skip
    write(tmp_path / "mimic-cxr-2.0.0-metadata.csv.gz", "dicom_id,subject_id,study_id,ViewPosition", "d1,10000032,50,PA",
          "d2,10000033,51,LATERAL", "d3,10000033,51,AP", "d4,10000033,51,AP", zipped=True)  # fmt: skip
    table = sets.mimic_cxr_jpg(tmp_path)
    assert table.paths == ["files/p10/p10000032/s50/d1.jpg", "files/p10/p10000033/s51/d3.jpg"]
    assert table.splits == ["train", "val"] and table.patients == ["10000032", "10000033"]
    assert table.findings[0].tolist() == [0, 0, 1, -1] + [0] * 10
    assert [entry.key for entry in table.skipped] == ["d4"]
    assert len(sets.mimic_cxr_jpg(tmp_path, frontal=False).paths) == 3
    assert table.metadata[:, 1].tolist() == [0, 1] and np.isnan(table.metadata[:, 0]).all() and table.reports == ["", ""]
    write(tmp_path / "patients.csv", "subject_id,gender,anchor_age", "10000032,F,52")
    report = tmp_path / "mimic-cxr-reports" / "files" / "p10" / "p10000032" / "s50.txt"
    write(report, " EXAMINATION:  CHEST", " FINDINGS:", " Clear lungs.", " No effusion.", " IMPRESSION:", " Normal.")
    with_reports = sets.mimic_cxr_jpg(tmp_path, reports=True)
    assert with_reports.metadata[0].tolist() == [0, 0, 52] and with_reports.reports == ["Clear lungs. No effusion."]
    assert [entry.reason.split(":")[0] for entry in with_reports.skipped] == ["missing report", "missing report"]


def test_chexpert(tmp_path):
    header = "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(sets.CHEXPERT_FINDINGS)
    path = "CheXpert-v1.0-small/{}/patient{}/study1/view1_{}.jpg"
    frontal, lateral = (path.format("train", "00001", view) for view in ("frontal", "lateral"))
    labels = ["1.0", *[""] * 12, "1.0"]
    write(tmp_path / "train.csv", header, ",".join([frontal, "Female", "68", "Frontal", "AP", *labels]),
          ",".join([lateral, "Female", "68", "Lateral", "", *labels]))  # fmt: skip
    write(tmp_path / "valid.csv", header, path.format("valid", "64541", "frontal") + ",Male,73,Frontal,AP" + ",0.0" * 14,
          path.format("valid", "64542", "frontal") + ",Male,73,Frontal,AP" + ",7" * 14)  # fmt: skip
    table = sets.chexpert(tmp_path)
    assert table.paths == [f"{s}/patient{p}/study1/view1_frontal.jpg" for s, p in (("train", "00001"), ("valid", "64541"))]
    assert table.patients == ["patient00001", "patient64541"] and table.splits == ["", "test"]
    assert table.findings[0].tolist() == [1] + [0] * 12 + [1] and len(table.skipped) == 1
    assert table.metadata.tolist() == [[0, 1, 68], [1, 1, 73]]


def test_padchest(tmp_path):
    write(tmp_path / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", ",ImageID,ImageDir,PatientID,Projection,Labels",
          "0,a.png,0,p1,PA,\"['pleural effusion', 'nodule']\"", "1,b.png,1,p2,AP,\"['normal']\"",
          "2,c.png,1,p2,L,\"['nodule']\"", "3,d.png,1,p3,PA,broken", zipped=True)  # fmt: skip
    table = sets.padchest(tmp_path, least=1)
    assert table.names == ["nodule", "pleural effusion"] and table.paths == ["0/a.png", "1/b.png"]
    assert table.findings.tolist() == [[1, 1], [0, 0]] and table.skipped[0].key == "d.png"
    assert sets.padchest(tmp_path, least=2).names == ["nodule"]


def test_vindr_cxr(tmp_path):
    folder = tmp_path / "annotations"
    write(folder / "image_labels_train.csv", "image_id,rad_id,Cardiomegaly,Nodule/Mass", "x,R1,1,0", "x,R2,1,0", "x,R3,0,1")
    write(folder / "image_labels_test.csv", "image_id,Cardiomegaly,Nodule/Mass", "y,0,1")
    table = sets.vindr_cxr(tmp_path)
    assert table.paths == ["train/x.dicom", "test/y.dicom"] and table.splits == ["", "test"]
    assert table.findings.tolist() == [[1, 0], [0, 1]] and table.names == ["Cardiomegaly", "Nodule/Mass"]


def test_rsna_pneumonia(tmp_path):
    write(tmp_path / "stage_2_train_labels.csv", "patientId,x,y,width,height,Target", "a,,,,,0", "b,1,2,3,4,1", "b,5,6,7,8,1")
    table = sets.rsna_pneumonia(tmp_path)
    assert table.paths == ["stage_2_train_images/a.dcm", "stage_2_train_images/b.dcm"] and table.findings.tolist() == [[0], [1]]


def test_candid_ptx(tmp_path):
    write(tmp_path / "Pneumothorax_reports.csv", "PseudoPatientID,SOPInstanceUID,EncodedPixels,Report", "p1,1.2,-1,text",
          "p1,1.3,5 3 1 2,text", "p1,1.3,0 1,text", "p2,1.4,5,text")  # fmt: skip
    table = sets.candid_ptx(tmp_path)
    runs = table.runs["pneumothorax"]
    assert [entry.key for entry in table.skipped] == ["1.4"] and runs["dataset/1.2.dcm"].shape == (0, 2)
    assert runs["dataset/1.3.dcm"].tolist() == [[5, 3], [9, 2], [0, 1]]
    # Down the columns of 4 pixels: pixel 0, pixels 1 to 3 of the second column, 1 and 2 of the third.
    expected = [[1, 0, 0], [0, 1, 1], [0, 1, 1], [0, 1, 0]]
    assert mask_of_runs(runs["dataset/1.3.dcm"], (3, 4)).astype(int).tolist() == expected
    with pytest.raises(BadSample, match="leaves its image of 5 x 2"):
        mask_of_runs(runs["dataset/1.3.dcm"], (5, 2))
    assert table.paths == ["dataset/1.2.dcm", "dataset/1.3.dcm"] and table.patients == ["p1", "p1"]
    assert table.findings.tolist() == [[0], [1]]


def test_a_folder_without_the_files_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no train.csv"):
        sets.chexpert(tmp_path)
