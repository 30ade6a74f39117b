"""Tables are what was measured, in words."""

import doctest

import pytest

from experiments.lib import divergence, tables
from experiments.lib.passages import reading
from experiments.lib.tables import flat, markdown, speeds


def test_what_varies_over_prompts_says_how_much():
    row = {
        "temperature": 0.0,
        "set": "qa",
        "way": "+sd",
        "seconds_per_100_tokens": 2.0,
        "speedup": 1.5,
        "speedup_deviation": 0.25,
        "acceptance_rate": 0.5,
        "step_seconds": 0.004,
    }
    (shown,) = speeds({"results": [row]})
    assert shown == {
        "T": "0",
        "set": "qa",
        "way": "+sd",
        "α": 0.5,
        "ms a draft step": 4,
        "s/100 tokens": 2,
        "speed-up": "1.500 ± 0.250",
    }


def test_any_rows_are_shown_as_they_are():
    assert flat({"results": [{"a": 1, "b": [1], "c": {}}]}) == [{"a": 1}]
    assert flat({"parts": {}}) == []


def test_a_table_has_the_columns_of_all_rows():
    rows = [{"a": 0.12345, "b": 12.345}, {"a": 123.45, "c": "x|y"}, {"b": None}]
    lines = markdown(rows).split("\n")
    assert lines[0] == "| a | b | c |"
    assert lines[2:] == ["| 0.123 | 12.35 |  |", "| 123 |  | x\\|y |", "|  |  |  |"]


@pytest.mark.parametrize("module", [divergence, reading, tables])
def test_examples_are_true(module):
    found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0
