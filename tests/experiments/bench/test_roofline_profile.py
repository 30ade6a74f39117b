"""Kernels of the median round are counted, and so are the gaps between them."""

from types import SimpleNamespace

import pytest

from easyspec_jax import EasySpecError
from experiments.bench.roofline_profile import LONGEST, kernels
from experiments.paper.timeline import ROUND


def profile(rounds, **streams):
    """Make a profile of one GPU: rounds of the host, and kernels as (name, begin, end)."""

    def line(name, events):
        made = [SimpleNamespace(name=n, start_ns=b, end_ns=e, stats=[]) for n, b, e in events]
        return SimpleNamespace(name=name, events=made)

    host = line("python", [(ROUND, begin, end) for begin, end in rounds])
    device = [line(f"Stream {name}", events) for name, events in streams.items()]
    planes = {"/host:CPU": [host], "/device:GPU:0": device}
    return SimpleNamespace(
        planes=[SimpleNamespace(name=name, lines=lines) for name, lines in planes.items()]
    )


def test_the_median_round_is_described():
    rounds = [(0, 10), (100, 200), (1000, 9000)]
    # In the second round: gemm 110-120 and 130-150, a copy on another stream in its shadow.
    one = [("gemm.1", 1, 2), ("gemm.1", 110, 120), ("gemm.2", 130, 150), ("fusion", 160, 170)]
    found = kernels(profile(rounds, one=one, two=[("copy", 132, 140)]))
    assert found["kernels"] == 4
    assert found["traced_seconds"] == pytest.approx(100e-9)
    assert found["first_seconds"] == pytest.approx(10e-9)
    assert found["gaps_seconds"] == pytest.approx(20e-9)  # 120-130 and 150-160
    assert found["median_gap_seconds"] == pytest.approx(10e-9)
    assert found["busy_share"] == pytest.approx(40 / 60)
    assert [(row["kind"], row["count"]) for row in found["longest"]][:1] == [("gemm", 2)]


def test_only_the_longest_kinds_are_listed():
    many = [(f"k{number}", number, number + 1) for number in range(2 * LONGEST)]
    assert len(kernels(profile([(0, 100)], one=many))["longest"]) == LONGEST


def test_profiles_without_rounds_or_kernels_are_refused():
    with pytest.raises(EasySpecError, match="no rounds"):
        kernels(profile([], one=[("gemm", 0, 1)]))
    with pytest.raises(EasySpecError, match="no kernels"):
        kernels(profile([(0, 10)], one=[("gemm", 20, 21)]))
