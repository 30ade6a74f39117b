"""Titles name the models."""

from experiments.lib.picture import draft_title, pair_title


def test_titles_name_the_models():
    pair = {"target": "big", "draft": "small", "bundled": False}
    assert (pair_title(pair), draft_title(pair)) == ("big, drafted by small", "small")
    bundled = pair | {"bundled": True}
    assert (pair_title(bundled), draft_title(bundled)) == ("the bundled pair", "the bundled draft")
