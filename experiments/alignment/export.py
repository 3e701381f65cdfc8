"""Stage ``export``: the trained dual encoder as a directory that loads back in one line, with a card of what was measured."""

from __future__ import annotations

import json
import logging
from typing import Literal

from omegaconf import OmegaConf

from experiments.alignment import pipeline
from experiments.run.directory import Run
from experiments.run.origin import origin_facts, origin_record
from experiments.stages import Facts, stage
from models.alignment.dual_encoder import save_dual_encoder
from models.errors import UserError
from models.io import atomic_directory

log = logging.getLogger("run")


@stage(repeat=True, needs_weights=True)
def export(run: Run, copy_encoders: bool = True, format: Literal["own", "official"] = "own") -> Facts:
    """Write ``<run>/export``; an older one is replaced whole. The card's numbers are those of this run's ``evaluate``.

    Args:
        run: the run.
        copy_encoders: put the encoders' files beside the head.
        format: names of the head's weights: our own, or those of the method's official code.
    """
    model, module = pipeline.trained_dual_encoder(run), OmegaConf.to_container(run.cfg.module, resolve=True)
    head = {key: value for key, value in module["head"].items() if key != "_partial_"}
    arguments = {modality: pipeline.encoder_arguments(run, modality) for modality in ("vision", "text")}
    arguments["head"] = head | pipeline.head_widths(run, {"vision": model.vision, "text": model.text})
    official = None
    if format == "official":
        if not module.get("importer"):
            raise UserError("pipeline.export.format=official: this module knows no official code (module.importer is null).")
        official = module["importer"]["_target_"].rpartition(".")[0]
    with atomic_directory(run.dir / "export") as folder:
        save_dual_encoder(folder, model, arguments, official, copy_encoders)
        (folder / "README.md").write_text(_card(run, model.vision.identity, model.text.identity))
    log.info("export: %s", run.dir / "export")
    return {"folder": str(run.dir / "export")}


def _card(run: Run, vision: dict, text: dict) -> str:
    evaluated = run.facts("evaluate") or origin_facts(run, "evaluate")
    metrics, others = evaluated.get("metrics", {}), evaluated.get("baselines", {})
    others = {name: facts.get("metrics", {}) for name, facts in run.facts("compare").get("columns", {}).items()} | others
    lines = [
        "---", "pipeline_tag: zero-shot-image-classification", "tags: [image-text, dual-encoder, projector-alignment]", "---",
        f"# {run.record['experiment']}", "",
        f"{_trained_on(run)}.",
        f"Frozen encoders: {vision['name']} (vision) and {text['name']} (text); only the projectors between them were trained.",
        "", "```python", "from models.alignment.dual_encoder import load_dual_encoder", "",
        'model = load_dual_encoder("<this directory>")',
        "images = model.encode_image(model.preprocess(image)[None], normalize=True)",
        'texts = model.encode_text(model.tokenizer(["a dog", "a cat"]), normalize=True)', "```", "",
        "## Measured", "",
    ]  # fmt: skip
    if metrics:
        lines += [f"On the split `{evaluated['split']}` of the data, percent unless the name says otherwise.", ""]
        lines += [f"| metric | this model | {' | '.join(others)} |", "|---" * (2 + len(others)) + "|"]
        for name, value in metrics.items():
            cells = (f"{column[name]:.2f}" if name in column else "" for column in others.values())
            lines.append(f"| {name} | {value:.2f} | {' | '.join(cells)} |")
    else:
        lines.append("Nothing: no stage `evaluate` has run.")
    notes = dict.fromkeys([*origin_record(run)["notes"], *run.notes])
    lines += ["", "## Notes", "", *(f"- {note}" for note in notes or ["none"])]
    identities = {"hashes": evaluated.get("hashes", {}), "vision": vision, "text": text}
    lines += ["", "## Identity", "", "```json", json.dumps(identities, indent=1), "```", ""]
    return "\n".join(lines)


def _trained_on(run: Run) -> str:
    """The data of the run that trained the head, in a sentence."""
    data = origin_facts(run, "fit").get("trained_on")
    if data is None:
        return "Trained elsewhere: its checkpoint does not say on which data"
    kind, train = data["datamodule"].rpartition(".")[2], data["splits"].get("train", {})
    where = "SIMULATED DATA" if data["simulated"] else f"the data in {data['root']}"
    return f"Trained on {where}: {train.get('samples')} samples of {kind}, fingerprint {train.get('fingerprint')}"
