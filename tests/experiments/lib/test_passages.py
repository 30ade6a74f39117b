"""Passages of documents are figures of the results."""

import json

import pytest

from experiments.lib.passages import acceptance, speeds


@pytest.fixture
def results(tmp_path):
    """Write files of results and return their directory."""

    def write(**files):
        for name, rows in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps({"results": rows}))
        return tmp_path

    return write


def row(draft, lp_size, rate, **fields):
    common = {"draft": draft, "lp_size": lp_size, "acceptance_rate": rate, "temperature": 0.0}
    return common | {"tree_width": 1, "calibration": True, "verifier": "greedy"} | fields


def test_acceptance_has_every_pair_by_size(results):
    demo = [
        row("exact", 1, 0.7),
        row("N = 2", 2, 0.6),
        row("N = 3", 3, 0.5),
        row("N = 6", 6, 0.4),
        row("N = 2", 2, 0.9, tree_width=4),
    ]
    other = [
        row("exact", 1, 1.0),
        row("N = 2, refit", 2, 0.8, refit=True),
        row("N = 2, no calibration", 2, 0.3, calibration=False),
        row("N = 2", 2, 0.55),
    ]
    real = [row("exact", 1, 0.56), row("N = 2", 2, 0.5), row("N = 6", 6, 0.1, temperature=0.8)]
    files = {"acceptance_demo": demo, "acceptance": other, "acceptance_qwen": real}
    lines = acceptance.acceptance(results(**files)).split("\n")
    assert lines[2:] == [
        "| exact | 0.700 | 1.000 | 0.560 |",
        "| fuzzy, N = 2 | 0.600 | 0.550 | 0.500 |",
        "| fuzzy, N = 2, no calibration |  | 0.300 |  |",
        "| fuzzy, N = 2, refit |  | 0.800 |  |",
        "| fuzzy, N = 6 | 0.400 |  |  |",
    ]


def test_the_real_drafts_acceptance_is_by_width_and_temperature(results):
    greedy = [row("N = 2", 2, 0.5, groups="0,1-2,3"), row("exact", 1, 0.75, groups="0,1,2,3")]
    refit = row("N = 2, refit", 2, 0.625, groups="0-1,2-3", refit=True)
    sampled = [
        row("exact", 1, 0.25, groups="0,1,2,3", temperature=0.8),
        row("N = 2, no calibration", 2, 0.125, temperature=0.8, calibration=False),
    ]
    directory = results(acceptance_qwen=[*greedy, refit], acceptance_qwen_sampled=sampled)
    assert acceptance.acceptance_qwen(directory).split("\n") == [
        "| draft | turns of attention | width 1 | width 1, T = 0.8 |",
        "| - | - | - | - |",
        "| exact | 4 | .750 | .250 |",
        "| N = 2 | 3 | .500 |  |",
        "| N = 2, refit | 2 | .625 |  |",
    ]


def test_acceptance_on_tasks_is_by_kind_and_width(results):
    code, prose = ([row("exact", 1, rate), row("exact", 1, rate, tree_width=4)] for rate in (1, 0))
    table = acceptance.acceptance_qwen_tasks(
        results(acceptance_qwen_code=code, acceptance_qwen_prose=prose)
    )
    assert table.split("\n")[::2] == [
        "| draft | code, width 1 | code, width 4 | prose, width 1 | prose, width 4 |",
        "| exact | 1.000 | 1.000 | .000 | .000 |",
    ]


def test_whole_layers_stand_next_to_their_attentions(results):
    ways = [("plain decoding", 1, None), ("in order", 1, 0.75)]
    ways += [("attention only", 2, 0.625), ("whole layers", 2, 0.5)]
    rows = [{"at_once": way, "lp_size": size, "acceptance_rate": rate} for way, size, rate in ways]
    assert acceptance.table5_qwen(results(table5_qwen=rows)).split("\n")[::2] == [
        "| N | attentions at once | whole layers at once |",
        "| 1, in order | .750 |  |",
    ]


def test_what_groups_keep_is_by_size_and_set(results):
    def rows(first):
        return [
            {"lp_size": 4, "refit": refit, "overlap": [first + refit / 8, 0.25]}
            for refit in (False, True)
        ]

    directory = results(table4_smollm2=rows(0.5), table4_smollm2_unseen=rows(0.125))
    lines = acceptance.kept(directory).split("\n")
    assert lines[0] == "| N | A | A, refit | unseen | unseen, refit |"
    assert lines[2:] == ["| 4 | .500 .250 | .625 .250 | .125 .250 | .250 .250 |"]


def test_trees_are_means_over_calibrated_groups(results):
    sampled = {"temperature": 0.8, "verifier": "coupled"}
    rows = [
        row("exact", 1, 0.9, **sampled),
        row("N = 2", 2, 0.5, **sampled),
        row("N = 3", 3, 0.25, **sampled),
        row("N = 3", 3, 0.1, **sampled | {"calibration": False}),
    ]
    rows += [own | {"verifier": "rejection", "acceptance_rate": 0.5} for own in rows]
    lines = acceptance.trees(results(acceptance_demo=rows)).split("\n")
    assert lines == ["|  | width 1 |", "| - | - |", "| rejection | .500 |", "| coupled | .375 |"]


def test_speeds_are_medians_over_plain_decoding(results):
    ways = [*speeds.WAYS, "another"]
    rows = [{"name": way, "over_plain": [1.0, 3.0, 2.0]} for way in ways]
    rows.append({"name": "vLLM", "missing": "not installed"})
    lines = speeds.peers(results(peers=rows)).split("\n")
    assert lines[2] == "| easyspec, N = 4 | 2.00 |"
    assert len(lines) == 2 + len(speeds.WAYS)


def test_the_least_share_counts(results):
    rows = [{"share_of_fastest": 1.0}, {"share_of_fastest": 0.954}]
    directory = results(tune_check=rows, tune_check_smollm2=[{"share_of_fastest": 0.97}])
    assert speeds.tune_share(directory) == "0.95"
