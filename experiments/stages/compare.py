"""Stage ``compare``: variants of this run, trained and evaluated like it, as columns of its table."""

from __future__ import annotations

import logging

from hydra import compose

from experiments.config.overrides import creating, key_of
from experiments.run.directory import Run, variant_of
from experiments.run.origin import REQUIRED
from experiments.runner import run_stages
from experiments.stages import Facts, stage

log = logging.getLogger("run")
OF_THE_MAIN_RUN = {"checkpoint", "stages", "resume"}  # overrides that do not apply to its variants


@stage()
def compare(run: Run) -> Facts:
    """Run each entry of ``compare``: this recipe with a few overrides, in a subdirectory of this run.

    A variant runs the stages that stand before ``compare`` in this run's list. Where the recipe starts from weights, it starts
    from those of this run.
    """
    stages = run.cfg.stages[: list(run.cfg.stages).index("compare")]
    columns = {}
    for name, overrides in (run.cfg.compare or {}).items():
        if overrides is None:  # a run does without a variant of its recipe
            continue
        log.info("compare with %s: %s", name, " ".join(overrides))
        combined = [o for o in run.overrides if key_of(o) not in OF_THE_MAIN_RUN]
        combined += [*creating(overrides), f"stages=[{','.join(stages)}]"]
        config = compose("config", overrides=combined)
        if config.checkpoint == REQUIRED:
            combined += [o for o in run.overrides if key_of(o) == "checkpoint"]
            config = compose("config", overrides=combined)
        variant = variant_of(run, name, config, combined)
        run_stages(variant)
        variant.set_status("finished")
        columns[name] = variant.facts("evaluate")
    return {"columns": columns}
