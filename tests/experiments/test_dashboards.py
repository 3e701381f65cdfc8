"""The definitions of W&B workspaces, up to what would be sent."""

import json

import pytest

from experiments.dashboards import families, main, workspace
from models.errors import UserError


def definition(view):
    return json.loads(view._to_model().model_dump_json(exclude_none=True))["spec"]["section"]


def test_a_family_has_a_view_of_its_runs_with_its_metrics():
    section = definition(workspace("team", family="alignment"))
    (filters,) = [runs["filters"]["filters"] for runs in section["run_sets"]]
    assert [(each["key"]["name"], each["value"]) for each in filters] == [("tags", ["alignment"])]
    shown = {bank["name"]: bank["panels"] for bank in section["panel_bank_config"]["sections"]}
    assert {"Held-out metrics", "Losses", "Speed"} <= shown.keys()
    metrics = {name for panel in shown["Held-out metrics"] for name in panel["config"].get("metrics", [])}
    assert "val/retrieval/mean_recall" in metrics
    assert all(name.startswith("val/") for name in metrics)


def test_a_sweep_has_parallel_coordinates_and_importance(capsys):
    main(["entity=team", "family=bev_fusion", "sweep=misalignment", "show=true"])
    section = json.loads(capsys.readouterr().out)["spec"]["section"]
    (bank,) = [bank for bank in section["panel_bank_config"]["sections"] if bank["name"] == "Sweep"]
    parallel, importance, _ = bank["panels"]
    assert importance["config"]["target_key"] == "test/bev/iou"
    assert "config:refinement.value" in json.dumps(parallel)
    filters = section["run_sets"][0]["filters"]["filters"]
    assert {(each["key"]["name"]) for each in filters} == {"tags", "group"}


def test_every_family_has_a_view_and_mistakes_are_named(capsys):
    main(["entity=team", "show=true"])
    assert capsys.readouterr().out.count('"display_name"') == 1 + len(families())
    with pytest.raises(UserError, match="entity=<name>"):
        main([])
    with pytest.raises(UserError, match="is none of"):
        main(["entity=team", "family=hamer"])
    with pytest.raises(UserError, match="unknown settings projekt"):
        main(["entity=team", "projekt=x"])
