"""Phantoms of radiographs with reports, questions and a knowledge graph, in SLAKE's files and those of a knowledge base.

The graph holds what no report says: which disease a finding suggests, and the synonyms of both. Some diseases are asked for in
the test split alone, so that their names mean nothing to a model that does not know the graph. The relations are invented: real
words stand for them, no medicine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from datamodules.simulated.radiographs import FINDINGS, IMAGES_PER_PATIENT, Person, phantom
from datamodules.simulated.worlds import SPLIT_STARTS
from datamodules.tokenizers.base import BERT_SPECIALS
from models.io import atomic_directory, stable_hash

WORLD = 2  # raise it when the same arguments would give other images, reports, questions or names

NAMES = {
    "Cardiomegaly": ("cardiomegaly", "enlarged heart", "cardiac enlargement"),
    "Consolidation": ("consolidation", "airspace opacity", "alveolar filling"),
    "Effusion": ("pleural effusion", "pleural fluid", "hydrothorax"),
    "Nodule": ("nodule", "coin lesion", "focal density"),
    "Pneumothorax": ("pneumothorax", "pleural air", "collapsed lung"),
}
DISEASES = {  # a few are asked for in the test split alone, see `unseen`
    "Cardiomegaly": (
        "cardiomyopathy", "heart failure", "mitral regurgitation", "myocarditis", "aortic stenosis", "amyloidosis",
        "pericarditis", "thyrotoxicosis",
    ),
    "Consolidation": (
        "pneumonia", "tuberculosis", "aspiration", "legionellosis", "lung infarction", "psittacosis", "alveolar proteinosis",
        "eosinophilic syndrome",
    ),
    "Effusion": (
        "nephrosis", "cirrhosis", "empyema", "mesothelioma", "pancreatitis", "chylothorax", "serositis", "hypoalbuminemia",
    ),
    "Nodule": (
        "granuloma", "hamartoma", "carcinoma", "metastasis", "histoplasmosis", "silicosis", "sarcoidosis", "carcinoid",
    ),
    "Pneumothorax": (
        "emphysema", "chest trauma", "cystic fibrosis", "bleb rupture", "barotrauma", "endometriosis", "asthma",
        "connective tissue disorder",
    ),
}  # fmt: skip
RELATION, GROUP, MEMBER = "suggests", "finding", "is_a"
KINDS = ("closed", "open")


class Asked(NamedTuple):
    """A question, its answer and its kind."""

    text: str
    answer: str
    kind: str


def unseen(count: int) -> set[str]:
    """The last ``count`` diseases of each finding: no report and no question of the splits train and val names them."""
    return {disease for of_finding in DISEASES.values() for disease in of_finding[len(of_finding) - count :]}


def report(present: set[str], rng: np.random.Generator) -> str:
    """One sentence that names the findings in words that vary."""
    if not present:
        return ("normal chest", "no abnormality is seen", "the lungs and heart are normal")[rng.integers(3)]
    names = [NAMES[finding][rng.integers(3)] for finding in sorted(present)]
    return f"{('there is', 'the image shows', 'consistent with')[rng.integers(3)]} {' and '.join(names)}"


def questions(present: set[str], diseases: dict[str, list[str]], rng: np.random.Generator) -> list[Asked]:
    """Is a finding there; does the image suggest a disease; which finding speaks for one of two diseases.

    Yes and no are equally likely, as far as the findings allow.

    Args:
        present: findings of the image.
        diseases: that may be asked for, by finding.
        rng: decides on the questions.
    """
    out = []
    for form, names in (("is there {} ?", NAMES), ("could this be {} ?", diseases)):
        pool = sorted(present) if rng.random() < 0.5 and present else sorted(set(FINDINGS) - present) or sorted(present)
        finding = pool[rng.integers(len(pool))]
        name = names[finding][rng.integers(len(names[finding]))]
        out.append(Asked(form.format(name), "yes" if finding in present else "no", "closed"))
    shown, absent = sorted(present), sorted(set(FINDINGS) - present)
    if shown and absent:
        finding, other = shown[rng.integers(len(shown))], absent[rng.integers(len(absent))]
        pair = [diseases[name][rng.integers(len(diseases[name]))] for name in (finding, other)]
        first, second = (pair[i] for i in rng.permutation(2))
        out.append(Asked(f"which sign of {first} or {second} is seen ?", NAMES[finding][0], "open"))
    return out


def write_medical_world(
    root: str,
    train: int = 2400,
    val: int = 100,
    test: int = 300,
    image_size: int = 48,
    prevalence: float = 0.3,
    held_out: int = 3,
    seed: int = 0,
) -> Path:
    """The folder with the simulated set of these arguments, written unless it is there already.

    Args:
        root: the set is ``root/medical_<hash of the arguments>`` and appears whole or not at all.
        train: number of images; two of each patient, who is in one split alone.
        val: likewise.
        test: likewise.
        image_size: side of the square PNGs in pixels.
        prevalence: of each finding, independent of the others.
        held_out: diseases of each finding that the test split alone asks for.
        seed: of everything.
    """
    sizes = {"train": train, "val": val, "test": test}
    folder = Path(root, f"medical_{stable_hash([WORLD, sizes, image_size, prevalence, held_out, seed])}")
    if folder.is_dir():
        return folder
    with atomic_directory(folder, sync=False) as scratch:
        (scratch / "imgs").mkdir()
        lines: list[str] = []
        for split, count in sizes.items():
            hidden = set() if split == "test" else unseen(held_out)
            diseases = {finding: [d for d in of_finding if d not in hidden] for finding, of_finding in DISEASES.items()}
            asked: list[dict[str, Any]] = []
            for number in range(count):
                identity = SPLIT_STARTS[split] + number // IMAGES_PER_PATIENT
                rng = np.random.default_rng((seed, SPLIT_STARTS[split] + number, 3))
                person = np.random.default_rng((seed, identity, 2))
                patient = Person(bool(person.random() < 0.5), int(person.integers(20, 90)), person)
                present = {finding for finding in FINDINGS if rng.random() < prevalence}
                name = f"{split}_{identity}_{number % IMAGES_PER_PATIENT}.png"
                pixels = phantom(image_size, present, patient, supine=False, rng=rng).pixels
                Image.fromarray(pixels).save(scratch / "imgs" / name)
                lines.append(f"{name}\t{report(present, rng)}")
                for i, (text, answer, kind) in enumerate(questions(present, diseases, rng)):
                    ids = {"img_id": number, "img_name": name, "qid": 10 * number + i, "q_lang": "en"}
                    asked.append({**ids, "question": text, "answer": answer, "answer_type": kind.upper()})
            file = {"train": "train.json", "val": "validate.json", "test": "test.json"}[split]
            (scratch / file).write_text(json.dumps(asked))
        (scratch / "captions.txt").write_text("\n".join(lines) + "\n")
        _write_knowledge(scratch / "knowledge")
        (scratch / "vocab.txt").write_text("\n".join([*BERT_SPECIALS, *_words()]) + "\n")
    return folder


def _write_knowledge(folder: Path) -> None:
    """``names.tsv`` and ``triples.tsv``: findings with synonyms, diseases, and what suggests what."""
    folder.mkdir()
    identifiers = {finding: f"F{number:03d}" for number, finding in enumerate(FINDINGS)}
    names = [f"{GROUP}\tabnormality"]
    names += [f"{identifiers[finding]}\t{name}" for finding in FINDINGS for name in NAMES[finding]]
    triples = [f"{identifiers[finding]}\t{GROUP}\t\t{MEMBER}" for finding in FINDINGS]
    for finding in FINDINGS:
        for number, disease in enumerate(DISEASES[finding]):
            identifier = f"D{FINDINGS.index(finding)}{number:02d}"
            names.append(f"{identifier}\t{disease}")
            triples.append(f"{identifiers[finding]}\t{identifier}\t\t{RELATION}")
    (folder / "names.tsv").write_text("\n".join(names) + "\n")
    (folder / "triples.tsv").write_text("\n".join(triples) + "\n")


def _words() -> list[str]:
    """Of all reports and questions."""
    texts = ["normal chest no abnormality is seen the lungs and heart are", "there image shows consistent with"]
    texts += ["is there could this be which sign of or seen ?"]
    texts += [name for group in (NAMES, DISEASES) for of_finding in group.values() for name in of_finding]
    return sorted({word for text in texts for word in text.split()})
