"""The paper's figures agree with each other."""

import pytest

from experiments.paper.published import BESIDE, PAIRS, TABLE_2, pairs, table_2
from experiments.registry import known


def test_table_2_is_ten_rows_of_two_pairs():
    assert [row.set for row in TABLE_2[:5]] == [row.set for row in TABLE_2[5:]]
    assert table_2(1, 0.8)[0] == {
        "set": "MMLU",
        "TP": 1.56,
        "+sd, speed-up": 2.47,
        "+sd, α": 0.65,
        "+tree, speed-up": 3.3,
        "+tree, α": 0.95,
        "EasySpec, speed-up": 3.94,
        "EasySpec, α": 0.93,
    }


@pytest.mark.parametrize("row", TABLE_2, ids=lambda row: f"{row.set}-{row.temperature}")
def test_speed_ups_are_of_one_time_on_one_device(row):
    """Each way's speed-up times its seconds is the time on one device."""
    for pair in range(len(PAIRS)):
        alone = [
            cells[pair].speedup * (cells[pair].drafting + cells[pair].verification)
            for cells in (row.sd, row.tree, row.easyspec)
        ]
        assert max(alone) / min(alone) < 1.03


def test_pairs_are_those_with_an_acceptance():
    found = [(pair.target, pair.draft, pair.temperature) for pair in pairs()]
    assert len(found) == len(set(found)) == 6
    assert all(known(name) for name in BESIDE)
