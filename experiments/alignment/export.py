"""Stage ``export``: the trained dual encoder as a directory that loads back in one line, with a card of what was measured."""

from __future__ import annotations

import json
import logging

from experiments.alignment import pipeline
from experiments.run import parts
from experiments.run.directory import Run
from experiments.stages import Facts, stage
from models.alignment.dual_encoder import save_dual_encoder
from models.errors import UserError
from models.io import atomic_directory

log = logging.getLogger("run")


@stage(repeat=True, needs_weights=True)
def export(run: Run, copy_encoders: bool = True) -> Facts:
    """Write ``<run>/export``; an older one is replaced whole. The card's numbers are those of this run's ``evaluate``."""
    vision, text = pipeline.encoder(run, "vision"), pipeline.encoder(run, "text")
    module = parts.trained_module(run, {"vision_dim": vision.feature_dim, "text_dim": text.feature_dim})
    if module.head.takes_tokens or run.cfg.get("layers") or not hasattr(module.head.vision_norm, "weight"):
        raise UserError("stages: export writes heads of SAIL's form, on pooled features; this head is of another form.")
    arguments = {modality: pipeline.encoder_arguments(run, modality) for modality in ("vision", "text")}
    with atomic_directory(run.dir / "export") as folder:
        save_dual_encoder(folder, vision, text, module.head, arguments, copy_encoders)
        (folder / "README.md").write_text(_card(run, vision.identity, text.identity))
    log.info("export: %s", run.dir / "export")
    return {"folder": str(run.dir / "export")}


def _card(run: Run, vision: dict, text: dict) -> str:
    evaluated = run.facts("evaluate")
    metrics, others = evaluated.get("metrics", {}), evaluated.get("baselines", {})
    others = {name: facts.get("metrics", {}) for name, facts in run.facts("compare").get("columns", {}).items()} | others
    lines = [
        "---", "pipeline_tag: zero-shot-image-classification", "tags: [image-text, dual-encoder, projector-alignment]", "---",
        f"# {run.record['experiment']}", "",
        f"{run.cfg.description or 'A dual encoder'}.",
        f"Frozen encoders: {vision['name']} (vision) and {text['name']} (text); only the projectors between them were trained.",
        "", "```python", "from models.alignment.dual_encoder import load_dual_encoder", "",
        'model = load_dual_encoder("<this directory>")',
        "image = model.encode_image(model.preprocess(picture)[None], normalize=True)",
        'text = model.encode_text(model.tokenizer(["a dog", "a cat"]), normalize=True)', "```", "",
        "## Measured", "",
    ]  # fmt: skip
    if metrics:
        lines += [f"On the split `{evaluated['split']}` of this run's data, percent unless the name says otherwise.", ""]
        lines += [f"| metric | this model | {' | '.join(others)} |", "|---" * (2 + len(others)) + "|"]
        for name, value in metrics.items():
            cells = (f"{column[name]:.2f}" if name in column else "" for column in others.values())
            lines.append(f"| {name} | {value:.2f} | {' | '.join(cells)} |")
    else:
        lines.append("Nothing: the run that wrote this did not evaluate it.")
    lines += ["", "## Notes", "", *(f"- {note}" for note in run.notes or ["none"])]
    identities = {"hashes": evaluated.get("hashes", {}), "vision": vision, "text": text}
    lines += ["", "## Identity", "", "```json", json.dumps(identities, indent=1), "```", ""]
    return "\n".join(lines)
