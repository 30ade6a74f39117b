"""Tables are what was measured, in words."""

from experiments.readme_tables import checkpoints, losses, speeds


def test_what_varies_over_prompts_says_how_much():
    row = {
        "temperature": 0.0,
        "set": "qa",
        "way": "+sd",
        "seconds_per_100_tokens": 2.0,
        "speedup": 1.5,
    }
    (shown,) = speeds(
        {
            "results": [
                row | {"speedup_deviation": 0.25, "acceptance_rate": 0.5, "step_seconds": 0.004}
            ]
        }
    )
    assert shown == {
        "T": "0", "set": "qa", "way": "+sd", "α": 0.5, "ms a draft step": 4, "s/100 tokens": 2,
        "speed-up": "1.500 ± 0.250",
    }  # fmt: skip


def test_losses_are_against_the_exact_draft():
    common = {"temperature": 0.0, "tree_width": 1}
    rows = [
        common | {"lp_size": 1, "calibration": True, "refit": False, "acceptance_rate": 0.75},
        common | {"lp_size": 2, "calibration": True, "refit": False, "acceptance_rate": 0.5},
        common | {"lp_size": 2, "calibration": True, "refit": True, "acceptance_rate": 0.625},
        common | {"lp_size": 2, "calibration": True, "acceptance_rate": 0.1, "temperature": 0.8},
    ]
    wide = [
        common
        | {
            "tree_width": 4,
            "lp_size": 1,
            "calibration": True,
            "refit": False,
            "acceptance_rate": 0.875,
        }
    ]
    exact, pair, exact_tree, _ = losses({"results": [*rows, *wide]})
    assert exact["α, calibrated"] == 0.75 and exact["α, refit"] is None
    assert (exact["width"], exact_tree["width"], exact_tree["α, calibrated"]) == (1, 4, 0.875)
    assert (pair["loss, calibrated"], pair["loss, refit"]) == (0.25, 0.125)


def test_of_several_runs_the_median_and_the_most_memory():
    def runs(*seconds):
        return [{"seconds": taken, "peak_bytes": taken * 2**30} for taken in seconds]

    measured = {
        "bytes": 5e8,
        "convert": runs(1, 4, 2),
        "copy": runs(1),
        "open": {"orbax, mesh 8": runs(3)[0]},
    }
    rows = checkpoints(measured)
    assert [row["what"] for row in rows] == [
        "conversion",
        "copy of the files",
        "opening, orbax, mesh 8",
    ]
    assert (rows[0]["GB"], rows[0]["seconds"], rows[0]["GiB held at most"]) == (0.5, 2, 4)
