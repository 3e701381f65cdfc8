"""Cohorts from their files to batches: folds, missing modalities, bins and standardised tables."""

import csv
import pickle
from functools import partial

import numpy as np
import pytest
import torch

from datamodules.patients import PatientsDataModule, stratified_ranks
from datamodules.readers.base import BadSample
from datamodules.readers.cohorts import Arrays, Cohort, PatchFiles
from datamodules.readers.patients import isic, mimic, read_arrays, scikit_survival
from datamodules.readers.tcga import tcga
from datamodules.simulated.patients import tcga_patients
from models.batch import INDEX, LABEL, SKIPPED
from models.errors import UserError
from models.mm_lego.batch import BIN, CENSORED, PRESENT, TARGETS, TIME, modality_key
from models.mm_lego.survival import survival_bins

BREAST = partial(scikit_survival, name="breast_cancer", modalities={"clinical": ["age", "er", "grade", "size"], "genes": "X"})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tcga_patients(str(tmp_path_factory.mktemp("world")), patients=80, missing=0.3, genes=4, patches=6, width=5)


def cohort_of(count=40, **truth):
    """Two tables of a cohort in which two samples belong to each patient."""
    rng = np.random.default_rng(0)
    names = [str(row) for row in range(count)]
    tables = {"a": Arrays(rng.normal(3, 2, (count, 1, 3))), "b": Arrays(rng.normal(size=(count, 1, 2)))}
    if not truth:
        truth = {TIME: rng.random(count).astype(np.float32) * 50, CENSORED: rng.random(count) < 0.5}
    return Cohort(names, [str(row // 2) for row in range(count)], tables, truth)


def data_of(cohort, **options):
    data = PatientsDataModule(cohort if callable(cohort) else lambda root: cohort, **{"num_workers": 0, **options})
    data.setup()
    return data


def test_folds_never_split_a_patient_and_hold_every_patient_once():
    cohort, tested = cohort_of(), []
    for fold in range(1, 6):
        data = data_of(cohort, fold=fold)
        patients = {name: set(split.patients) for name, split in data.splits.items()}
        assert not patients["train"] & patients["test"] and not patients["val"] & (patients["train"] | patients["test"])
        assert sum(map(len, patients.values())) == 20
        tested += sorted(patients["test"])
    assert sorted(tested) == sorted(set(cohort.patients))


def test_ranks_spread_every_stratum():
    strata = np.array([0] * 30 + [1] * 10)
    ranks = stratified_ranks(strata, np.random.default_rng(0))
    assert sorted(ranks) == list(range(40))
    assert [int(strata[ranks % 5 == part].sum()) for part in range(5)] == [2] * 5


def test_official_splits_are_those_of_random_split():
    data = data_of(cohort_of(41), splitting="official", fold=3, modalities=["b", "a"])
    parts = torch.utils.data.random_split(range(41), [28, 6, 7], torch.Generator().manual_seed(3))
    for name, part in zip(("train", "test", "val"), parts, strict=True):
        assert sorted(data.splits[name].rows.tolist()) == sorted(part.indices)


@pytest.mark.parametrize("statistics", ["train", "cohort"])
def test_bins_and_scales_come_from_the_training_split_or_the_cohort(statistics):
    cohort = cohort_of(60)
    data = data_of(cohort, statistics=statistics, num_bins=3)
    rows = data.splits["train"].rows if statistics == "train" else np.arange(60)
    times, censored = (torch.from_numpy(cohort.truth[name]) for name in (TIME, CENSORED))
    bins, edges = survival_bins(times[rows], censored[rows], 3)
    assert data.bin_edges == edges.tolist()
    assert torch.equal(torch.from_numpy(data.bins[rows]), bins) and set(data.bins) == {0, 1, 2}
    scaled = data.cohort.modalities["a"].values[rows]
    np.testing.assert_allclose(scaled.mean(axis=(0, 1)), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(axis=(0, 1)), 1, rtol=1e-5)
    facts = data.facts()
    assert facts["shapes"] == {"a": [1, 3], "b": [1, 2]} and facts["num_classes"] == 3
    assert facts["class_counts"] == torch.bincount(data.splits["train"].truth[BIN]).tolist()


def test_unknown_values_become_the_mean_and_constants_zero():
    values = np.array([[[1.0, np.nan, 5]], [[3.0, 4, 5]], [[8.0, 2, 5]], [[np.nan] * 3]])
    table = Arrays(values).standardise(np.array([0, 1]), scale=True)
    np.testing.assert_allclose(table.values[:, 0], [[-1, 0, 0], [1, 0, 0], [6, -2, 0], [0, 0, 0]])
    assert table.has.tolist() == [True, True, True, False]


def test_taken_modalities_nest_and_one_stays():
    data = data_of(cohort_of(60))
    before = None
    for share in (0.0, 0.3, 0.6, 1.0):
        present = torch.cat([batch[PRESENT] for batch in data.evaluation_dataloader("test", missing=share)])
        assert bool(present.any(dim=1).all())
        assert before is None or bool((present <= before).all())
        before = present
    assert bool((before.sum(dim=1) == 1).all())
    trained = data_of(cohort_of(60), missing={"train": 1.0})
    assert (trained.splits["train"].present.sum(axis=1) == 1).all() and trained.splits["test"].present.all()


def test_blocks_can_train_on_patients_who_do_not_overlap():
    apart = {name: data_of(cohort_of(60), overlap=0.0, modalities=[name]).splits for name in "ab"}
    patients = {name: set(splits["train"].patients) for name, splits in apart.items()}
    assert not patients["a"] & patients["b"] and abs(len(patients["a"]) - len(patients["b"])) <= 1
    assert patients["a"] | patients["b"] == set(data_of(cohort_of(60)).splits["train"].patients)
    assert apart["a"]["test"].rows.tolist() == apart["b"]["test"].rows.tolist()


def test_simulated_patients_are_read_as_tcga(world):
    whole = tcga(world, "simulated")
    assert [*whole.modalities] == ["omics", "slides"] and whole.modalities["omics"].shape == (1, 14)
    assert 80 <= len(whole.samples) < 100 and len(set(whole.patients)) == 80
    data = data_of(lambda root: tcga(world, "simulated", omics="by_kind"), patches=4, batch_size=16)
    batch = next(iter(data.train_dataloader()))
    assert batch[modality_key("slides")].shape == (16, 4, 5) and batch[modality_key("clinical")].shape == (16, 1, 2)
    missing = ~batch[PRESENT]
    assert bool(missing[:, 1:].any()) and not bool(missing[:, 0].any()) and batch[SKIPPED] == []
    for column, name in enumerate(data.cohort.modalities):
        assert not batch[modality_key(name)][missing[:, column]].any()
    data = data_of(lambda root: tcga(world, "simulated"), complete_only=True, patches=None)
    batch = next(iter(data.evaluation_dataloader("test")))
    assert bool(batch[PRESENT].all()) and batch[modality_key("slides")].shape[1] >= 4
    again = next(iter(data_of(lambda root: tcga(world, "simulated"), complete_only=True).evaluation_dataloader("test")))
    assert torch.equal(batch[INDEX], again[INDEX])


def test_redundancy_and_imbalance_are_what_they_say(tmp_path):
    def told_by_age(**options):
        cohort = tcga(tcga_patients(str(tmp_path), patients=600, genes=2, patches=2, noise=0.1, **options), "simulated")
        events = ~cohort.truth[CENSORED]
        age = cohort.modalities["omics"].values[events, 0, 0]
        return -np.corrcoef(age, np.log(cohort.truth[TIME][events]))[0, 1]

    alone, balanced, redundant = (
        told_by_age(imbalance=0.0),
        told_by_age(redundancy=0.0, imbalance=1.0),
        told_by_age(redundancy=1.0),
    )
    assert alone > balanced + 0.1 and redundant > balanced + 0.1


def test_patches_beyond_a_slides_own_are_cut(tmp_path):
    torch.save(torch.arange(1.0, 13).view(6, 2), tmp_path / "a.pt")
    torch.save(torch.cat([torch.ones(2, 2), torch.zeros(4, 2)]), tmp_path / "b.pt")
    torch.save(torch.ones(6, 3), tmp_path / "c.pt")
    (tmp_path / "d.pt").write_bytes(b"broken")
    bags = PatchFiles([tmp_path / "a.pt", tmp_path / "b.pt", None, tmp_path / "c.pt", tmp_path / "d.pt"], {"a": 3})
    assert bags.read(0).tolist() == [[1, 2], [3, 4], [5, 6]] and len(bags.read(1)) == 2
    assert bags.has.tolist() == [True, True, False, True, True]
    truth = {LABEL: np.array([0, 1, 0, 1, 0] * 4)}
    paths = [*bags.paths] * 4
    cohort = Cohort([str(i) for i in range(20)], [str(i) for i in range(20)], {"bag": PatchFiles(paths)}, truth)
    data = data_of(cohort, patches=5, eval_batch_size=20, val_share=0, folds=2, max_skipped=1.0)
    batches = [next(iter(data.evaluation_dataloader(split))) for split in ("train", "test")]
    kinds = {entry.reason.split(":")[0] for batch in batches for entry in batch[SKIPPED]}
    assert kinds == {"patches", "unreadable"} and batches[1][modality_key("bag")].shape[1:] == (5, 2)


def test_breast_cancer_patients_of_scikit_survival():
    pytest.importorskip("sksurv")
    data = data_of(BREAST, val_share=0.0)
    assert data.facts()["shapes"] == {"clinical": [1, 6], "genes": [1, 76]} and "val" not in data.splits
    assert len(data.splits["train"]) + len(data.splits["test"]) == 198
    events = [int((~data_of(BREAST, fold=fold).splits["test"].truth[CENSORED]).sum()) for fold in range(1, 6)]
    assert sum(events) == 51 and max(events) - min(events) <= 1
    with pytest.raises(UserError, match="no .'stage'"):
        BREAST(None, modalities={"clinical": ["age", "stage"]})
    with pytest.raises(UserError, match="competing"):
        BREAST(None, name="bmt")


def test_icu_stays(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.zeros((30, 6))
    labels[:10, 2], labels[5:15, 4] = 1, 1
    content = {"ep_tdata": rng.normal(size=(30, 24, 12)), "adm_features_all": rng.normal(size=(30, 5))}
    content["ep_tdata"][0, 0, 0] = np.inf
    content |= {"adm_labels_all": labels, "y_icd9": (rng.random((30, 20)) < 0.4).astype(int)}
    (tmp_path / "im.pk").write_bytes(pickle.dumps(content))
    cohort = mimic(tmp_path)
    assert cohort.modalities["static"].shape == (1, 5) and cohort.modalities["series"].shape == (24, 12)
    assert cohort.truth[LABEL].tolist() == [2] * 10 + [4] * 5 + [0] * 15
    assert cohort.modalities["series"].values[0, 0, 0] == 0
    assert mimic(tmp_path, "icd9").truth[LABEL].tolist() == content["y_icd9"][:, 7].tolist()
    both = mimic(tmp_path, "icd9", (1, 7))
    assert both.truth[TARGETS].shape == (30, 2)
    facts = data_of(both, val_share=0.0, folds=2).facts()
    assert (facts["task"], facts["num_classes"]) == ("multi_label", 2) and "class_counts" not in facts
    assert data_of(cohort, folds=2).facts()["num_classes"] == 6


def test_sizes_are_checked_before_files_are_read(tmp_path, monkeypatch):
    (tmp_path / "im.pk").write_bytes(pickle.dumps({"ep_tdata": np.zeros(100)}))
    assert len(read_arrays(tmp_path / "im.pk")["ep_tdata"]) == 100
    monkeypatch.setattr("datamodules.readers.patients.LARGEST_PICKLE", 500)
    with pytest.raises(UserError, match="more than 500 bytes is not read"):
        read_arrays(tmp_path / "im.pk")
    torch.save(torch.ones(1, 2), tmp_path / "a.pt")
    torch.save(torch.ones(1, 1).expand(10**9, 2), tmp_path / "b.pt")
    torch.save(torch.ones(9, 2), tmp_path / "c.pt")
    monkeypatch.setattr("datamodules.readers.cohorts.LARGEST_BAG", 40)
    bags = PatchFiles([tmp_path / f"{name}.pt" for name in "abc"])
    for sample, reason in ((1, "larger than the file"), (2, "more than 40")):
        with pytest.raises(BadSample, match=reason):
            bags.read(sample)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    (tmp_path / "im.pk").write_bytes(pickle.dumps({"ep_tdata": print}))
    with pytest.raises(UserError, match="asks for builtins.print"):
        read_arrays(tmp_path / "im.pk")


def test_skin_lesions(tmp_path):
    columns = "patient_id,image_name,sex,age_approx,anatom_site_general_challenge,diagnosis,benign_malignant,target".split(",")
    (tmp_path / "img_prep").mkdir()
    with (tmp_path / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for i in range(8):
            bad = i % 4 == 0
            writer.writerow(
                [f"P{i // 2}", f"I{i}", "male" if i % 2 else "female", "" if i == 3 else 40 + i, ["torso", "head"][i % 2]]
                + ["melanoma" if bad else "nevus", "malignant" if bad else "benign", int(bad)]
            )
            if i != 5:
                torch.save(torch.randn(15, 12), tmp_path / "img_prep" / f"I{i}.pt")
    cohort = isic(tmp_path)
    assert cohort.modalities["table"].shape == (1, 5) and cohort.modalities["image"].shape == (15, 12)
    assert cohort.truth[LABEL].tolist() == [1, 0, 0, 0] * 2 and cohort.patients[:4] == ["P0", "P0", "P1", "P1"]
    assert not cohort.modalities["image"].has[5] and np.isnan(cohort.modalities["table"].values[3, 0, 0])
    official = isic(tmp_path, leaks=True)
    assert official.modalities["table"].shape == (1, 9)
    assert official.modalities["table"].values[:, 0, -1].tolist() == official.truth[LABEL].tolist()


def test_impossible_settings_are_refused(world):
    for options, message in (
        ({"fold": 6}, "there are 5 folds"),
        ({"overlap": 1.5}, "is a share"),
        ({"missing": {"testing": 0.1}}, "the splits are"),
        ({"modalities": ["c"]}, "there is no"),
    ):
        with pytest.raises(UserError, match=message):
            data_of(cohort_of(), **options)
    with pytest.raises(UserError, match="is missing"):
        tcga(world, "blca")
