"""The stage ``compare``: which overrides of the run its variants have."""

import pytest
from hydra import compose, initialize_config_dir

from experiments.run.directory import Run
from experiments.stages import compare
from tests.experiments.tiny import CONF


def variants(monkeypatch, tmp_path, *overrides):
    """The configuration of each variant of a run with these overrides; nothing is trained."""
    configs = {}

    def variant_of(run, name, config, combined):
        configs[name] = config
        variant = Run(config, tmp_path / name, combined)
        variant.record = {"experiment": name, "notes": [], "stages": {"evaluate": {"facts": {}}}}
        return variant

    monkeypatch.setattr(compare, "variant_of", variant_of)
    monkeypatch.setattr(compare, "run_stages", lambda run: True)
    monkeypatch.setattr(Run, "set_status", lambda run, status: None)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        compare.compare(Run(compose("config", overrides=list(overrides)), tmp_path, list(overrides)))
    return configs


@pytest.mark.parametrize("checkpoint", ["/weights/all-in-one-base.ckpt", None])
def test_variants_of_a_recipe_that_starts_from_weights_start_from_those_of_the_run(monkeypatch, tmp_path, checkpoint):
    value = "null" if checkpoint is None else checkpoint
    configs = variants(
        monkeypatch, tmp_path, "experiment=paper/all_in_one/msrvtt_qa", f"checkpoint={value}",
        '+compare.slow=["optimizer.lr=1e-6"]',
    )  # fmt: skip
    assert configs["slow"].checkpoint == checkpoint and configs["slow"].optimizer.lr == 1e-6


def test_variants_of_other_recipes_do_not_start_from_the_checkpoint_of_the_run(monkeypatch, tmp_path):
    configs = variants(monkeypatch, tmp_path, "experiment=sail_dinov2", "checkpoint=/weights/gated.pt")
    assert configs["linear"].checkpoint is None


def test_a_run_may_do_without_a_variant_of_its_recipe(monkeypatch, tmp_path):
    configs = variants(monkeypatch, tmp_path, "experiment=rad_dino_small", "compare.no_ibot=null")
    assert [*configs] == ["findings_of_200", "reports"]
