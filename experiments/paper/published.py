"""The paper's figures (EasySpec, arXiv 2502.02493) next to ours: 8×A100, batch 1, N = 4."""

from statistics import fmean
from typing import Any, NamedTuple

from experiments.lib.tables import Rows

PAIRS = (("Llama-3-70B", "Llama-3-8B"), ("Qwen2-72B", "Qwen2-7B"))
"""The pairs of Table 2, in the order of its cells."""


class Cell(NamedTuple):
    """Seconds for 100 tokens by phase, speed-up over one device, acceptance rate."""

    drafting: float
    verification: float
    speedup: float
    acceptance_rate: float


class Row(NamedTuple):
    """A row of Table 2 with a cell for each of PAIRS.

    Attributes:
        tp: The speed-up of tensor parallelism alone.
    """

    temperature: float
    set: str
    tp: tuple[float, float]
    sd: tuple[Cell, Cell]
    tree: tuple[Cell, Cell]
    easyspec: tuple[Cell, Cell]


def _row(
    temperature: float,
    name: str,
    tp: tuple[float, float],
    *cells: tuple[float, float, float, float],
) -> Row:
    sd, other_sd, tree, other_tree, easyspec, other_easyspec = (Cell(*cell) for cell in cells)
    return Row(
        temperature, name, tp, (sd, other_sd), (tree, other_tree), (easyspec, other_easyspec)
    )


TABLE_2 = (
    _row(
        0, "MMLU", (1.53, 1.56),
        (3.52, 2.15, 2.05, 0.57), (3.32, 2.25, 2.13, 0.52),
        (2.52, 1.59, 2.82, 0.88), (2.38, 1.62, 2.96, 0.85),
        (1.7, 1.73, 3.38, 0.82), (1.65, 1.7, 3.55, 0.8),
    ),
    _row(
        0, "HumanEval", (1.55, 1.57),
        (2.93, 1.79, 2.5, 0.74), (2.82, 1.83, 2.58, 0.69),
        (2.53, 1.58, 2.87, 0.92), (2.26, 1.51, 3.18, 0.95),
        (1.61, 1.63, 3.64, 0.87), (1.48, 1.54, 3.97, 0.91),
    ),
    _row(
        0, "MATH", (1.52, 1.54),
        (2.96, 1.74, 2.45, 0.73), (2.48, 1.65, 2.86, 0.78),
        (2.5, 1.47, 2.9, 0.95), (2.2, 1.45, 3.24, 0.96),
        (1.58, 1.55, 3.68, 0.91), (1.44, 1.47, 4.06, 0.95),
    ),
    _row(
        0, "IFEval", (1.5, 1.52),
        (3.68, 2.16, 1.93, 0.55), (4.24, 2.8, 1.64, 0.39),
        (2.53, 1.55, 2.76, 0.89), (2.8, 1.84, 2.49, 0.72),
        (1.68, 1.65, 3.39, 0.82), (1.87, 1.94, 3.04, 0.67),
    ),
    _row(
        0, "MGSM", (1.54, 1.56),
        (2.66, 1.61, 2.73, 0.8), (2.62, 1.75, 2.73, 0.72),
        (2.45, 1.48, 2.96, 0.96), (2.12, 1.5, 3.29, 0.94),
        (1.55, 1.51, 3.8, 0.93), (1.54, 1.57, 3.83, 0.88),
    ),
    _row(
        0.8, "MMLU", (1.53, 1.56),
        (3.09, 1.93, 2.32, 0.67), (2.9, 1.93, 2.47, 0.65),
        (2.49, 1.54, 2.89, 0.94), (2.14, 1.48, 3.3, 0.95),
        (1.59, 1.63, 3.61, 0.89), (1.49, 1.54, 3.94, 0.93),
    ),
    _row(
        0.8, "HumanEval", (1.54, 1.59),
        (2.94, 1.81, 2.48, 0.73), (2.54, 1.63, 2.91, 0.8),
        (2.47, 1.49, 2.98, 0.96), (2.08, 1.45, 3.44, 0.97),
        (1.53, 1.49, 3.9, 0.94), (1.45, 1.46, 4.17, 0.97),
    ),
    _row(
        0.8, "MATH", (1.53, 1.55),
        (2.81, 1.65, 2.59, 0.78), (2.44, 1.54, 2.98, 0.85),
        (2.44, 1.45, 2.97, 0.97), (2.09, 1.4, 3.39, 0.99),
        (1.52, 1.48, 3.86, 0.94), (1.43, 1.44, 4.13, 0.98),
    ),
    _row(
        0.8, "IFEval", (1.5, 1.51),
        (3.08, 1.87, 2.29, 0.67), (3.24, 2.14, 2.16, 0.56),
        (2.45, 1.46, 2.89, 0.97), (2.17, 1.51, 3.16, 0.91),
        (1.52, 1.5, 3.73, 0.92), (1.53, 1.58, 3.73, 0.87),
    ),
    _row(
        0.8, "MGSM", (1.55, 1.57),
        (2.54, 1.55, 2.85, 0.84), (2.68, 1.72, 2.73, 0.76),
        (2.3, 1.44, 3.13, 0.98), (2.08, 1.45, 3.41, 0.97),
        (1.52, 1.49, 3.88, 0.96), (1.46, 1.5, 4.06, 0.94),
    ),
)  # fmt: skip

TABLE_4: Rows = [
    {"N": 2, "h": 0.93, "q": 0.98, "k": 0.99, "v": 0.92, "attention output": 0.93},
    {"N": 3, "h": 0.89, "q": 0.97, "k": 0.98, "v": 0.86, "attention output": 0.88},
    {"N": 4, "h": 0.86, "q": 0.96, "k": 0.97, "v": 0.82, "attention output": 0.83},
]

TABLE_5: Rows = [
    {"pair": "Llama-3-70B, 1B", "at once": "attention only, N = 2", "tokens/s": 34.37, "α": 0.77},
    {"pair": "Llama-3-70B, 1B", "at once": "whole layers, N = 2", "tokens/s": 29.71, "α": 0.58},
    {"pair": "Qwen2-72B, 1.5B", "at once": "attention only, N = 4", "tokens/s": 29.94, "α": 0.76},
    {"pair": "Qwen2-72B, 1.5B", "at once": "whole layers, N = 2", "tokens/s": 27.37, "α": 0.68},
    {"pair": "Qwen2-72B, 1.5B", "at once": "whole layers, N = 3", "tokens/s": 24.10, "α": 0.51},
]

SPEEDS = {
    "Llama-3-70B": {1: 8.39, 2: 13.00, 4: 13.23, 8: 13.23},
    "Llama-3-70B, vLLM": {2: 19.5, 4: 28.47, 8: 28.25},
    "Llama-3-8B": {1: 36.76, 2: 33.90, 4: 32.31, 8: 32.39},
    "Llama-3-8B, vLLM": {1: 79.39, 2: 68.86, 4: 68.35, 8: 67.76},
    "Qwen2-7B": {1: 37.16, 2: 36.46, 4: 37.12},
    "Qwen2-7B, vLLM": {1: 83.38, 2: 73.9, 4: 73.81},
}
"""Table 6: tokens/s on A100s by the number of devices."""

TABLE_6: Rows = [
    {"model": name} | {f"{size}": line.get(size) for size in (1, 2, 4, 8)}
    for name, line in SPEEDS.items()
]

TABLE_8: Rows = [
    {
        "pair": "Qwen2-72B, 1.5B",
        "MMLU, +tree": 24.02,
        "MMLU, EasySpec": 29.94,
        "MATH, +tree": 27.54,
        "MATH, EasySpec": 36.11,
    },
    {
        "pair": "Qwen2-72B, 0.5B",
        "MMLU, +tree": 24.57,
        "MMLU, EasySpec": 29.29,
        "MATH, +tree": 29.61,
        "MATH, EasySpec": 35.82,
    },
    {
        "pair": "Llama-3-70B, 3B",
        "MMLU, +tree": 25.41,
        "MMLU, EasySpec": 31.32,
        "MATH, +tree": 27.49,
        "MATH, EasySpec": 35.78,
    },
    {
        "pair": "Llama-3-70B, 1B",
        "MMLU, +tree": 32.1,
        "MMLU, EasySpec": 34.37,
        "MATH, +tree": 35.7,
        "MATH, EasySpec": 40.0,
    },
    {
        "pair": "Llama-3-8B, 1B",
        "MMLU, +tree": 47.97,
        "MMLU, EasySpec": 56.49,
        "MATH, +tree": 54.04,
        "MATH, EasySpec": 64.97,
    },
]


_CELLS = {
    "+sd": lambda row: row.sd,
    "+tree": lambda row: row.tree,
    "EasySpec": lambda row: row.easyspec,
}
"""The cells of a row of Table 2, by the way of decoding."""


def table_2(pair: int, temperature: float) -> Rows:
    """Return the speed-ups and acceptance rates of one of PAIRS."""
    table = []
    for row in TABLE_2:
        if row.temperature == temperature:
            shown = {"set": row.set, "TP": row.tp[pair]}
            for name, cells in _CELLS.items():
                cell = cells(row)[pair]
                shown[f"{name}, speed-up"] = cell.speedup
                shown[f"{name}, α"] = cell.acceptance_rate
            table.append(shown)
    return table


class Published(NamedTuple):
    """A way of decoding: seconds of drafting and verification for 100 tokens, where published."""

    acceptance_rate: float | None
    speedup: float
    tokens_per_second: float
    drafting: float | None = None
    verification: float | None = None


class PublishedPair(NamedTuple):
    """A pair's figures.

    Attributes:
        sets: The prompt sets that `ways` is about, or averages over.
    """

    target: str
    draft: str
    temperature: float
    lp_size: int
    sets: str
    ways: dict[str, Published]


def pairs() -> list[PublishedPair]:
    """List the pairs whose acceptance the paper gives.

    Those are Table 2's at both temperatures and Table 5's layer-parallel ones at temperature 0.
    Where a table has only a speed-up or only a speed, the other follows from Table 2's time on one
    device.
    """
    return [
        _of_table_2(place, temperature) for temperature in (0, 0.8) for place in range(len(PAIRS))
    ] + [_of_table_5(row) for row in TABLE_5 if row["at once"].startswith("attention only")]


def _of_table_2(place: int, temperature: float) -> PublishedPair:
    rows = [row for row in TABLE_2 if row.temperature == temperature]
    speedup = fmean(row.tp[place] for row in rows)
    speed = fmean(row.tp[place] * 100 / _alone(row, place) for row in rows)
    ways = {"TP": Published(None, speedup, speed)}
    for name, cells in _CELLS.items():
        ways[name] = _mean([cells(row)[place] for row in rows])
    return PublishedPair(*PAIRS[place], temperature, 4, f"the mean of the {len(rows)} sets", ways)


def _of_table_5(row: dict[str, Any]) -> PublishedPair:
    target, draft = row["pair"].split(", ")
    place = [name for name, _ in PAIRS].index(target)
    mmlu = next(row for row in TABLE_2 if row.set == "MMLU" and row.temperature == 0)
    alone, speed = _alone(mmlu, place), row["tokens/s"]
    tp = Published(None, mmlu.tp[place], mmlu.tp[place] * 100 / alone)
    ways = {"TP": tp, "EasySpec": Published(row["α"], speed * alone / 100, speed)}
    size = int(row["at once"].rpartition("= ")[2])
    return PublishedPair(target, f"{target.rpartition('-')[0]}-{draft}", 0, size, "MMLU", ways)


def _alone(row: Row, place: int) -> float:
    """Return the seconds for 100 tokens on one device."""
    cell = row.easyspec[place]
    return cell.speedup * (cell.drafting + cell.verification)


def _mean(cells: list[Cell]) -> Published:
    drafting, verification, speedup, rate = (fmean(column) for column in zip(*cells, strict=True))
    return Published(rate, speedup, 100 / (drafting + verification), drafting, verification)


BESIDE: dict[str, dict[str, Rows]] = {
    "table2": {
        f"{target}, drafted by {draft}, temperature {temperature:g}": table_2(pair, temperature)
        for pair, (target, draft) in enumerate(PAIRS)
        for temperature in (0, 0.8)
    },
    "table4": {"Llama-3-8B on MMLU, cosines": TABLE_4},
    "table5": {"MMLU": TABLE_5},
    "table6": {"tokens/s of plain decoding by the number of devices": TABLE_6},
    "table8": {"tokens/s, temperature 0": TABLE_8},
}
"""The paper's tables to show with a file of results, by their headings."""
