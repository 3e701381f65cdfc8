"""The table of results."""

from experiments.stages.report import _groups


def test_columns_that_do_not_fit_go_into_further_tables():
    metrics, baselines = {"test/" + "m" * 55: 1.0}, {name * 12: {} for name in "abcdef"}
    assert _groups(metrics, {}, 160) == [[]]
    groups = _groups(metrics, baselines, 60 + 3 + 11 + 1 + 2 * 15)
    assert groups == [["a" * 12, "b" * 12], ["c" * 12, "d" * 12], ["e" * 12, "f" * 12]]
    assert len(_groups(metrics, baselines, 20)) == 6
