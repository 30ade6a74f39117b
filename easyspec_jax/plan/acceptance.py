"""Measured acceptance of drafts, read from the JSON of `experiments.acceptance` or of `tune`.

Both measure how far drafts see ahead of the target, by kind of draft and by tree width. Importing
this module does not import JAX.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SpeculativeConfig


@dataclass(frozen=True)
class Acceptance:
    """Acceptance of one draft at one tree width, by depth.

    Attributes:
        accepted: Mean accepted tokens of rounds of 1, 2, … levels, as far as it was measured.

    Examples:
        Of 100 rounds, 80 accepted level 1, 56 level 2 and 28 level 3:

        >>> acceptance = Acceptance.of_positions([80, 56, 28], rounds=100)
        >>> [round(rate, 3) for rate in acceptance.rates]
        [0.8, 0.7, 0.5]
        >>> round(acceptance.mean_accepted(3), 3)
        1.64
    """

    accepted: tuple[float, ...]

    @classmethod
    def of_positions(cls, per_position: Sequence[int], rounds: int) -> "Acceptance":
        """Derive it from `Stats.accepted_per_position`.

        Levels that a text did not reach were not accepted, so short texts make it a little low.

        Args:
            per_position: For each level, the rounds that accepted it.
            rounds: All rounds.
        """
        # Every level adds the share of rounds that accept it: [80, 56, 28] of 100 -> .8, 1.36, 1.64
        return cls(tuple(count / rounds for count in accumulate(per_position)))

    @property
    def measured_levels(self) -> int:
        """The deepest level that was measured."""
        return len(self.accepted)

    @property
    def rates(self) -> tuple[float, ...]:
        """For each measured level, the probability that it is accepted if the one above was."""
        rates, above, before = [], 1.0, 0.0
        for accepted in self.accepted:
            reached = max(accepted - before, 0.0)
            # Means of rounds of different depths are noisy: a share can exceed the one above.
            rates.append(min(reached / above, 1.0) if above else 0.0)
            above, before = reached, accepted
        return tuple(rates)

    def mean_accepted(self, levels: int) -> float:
        """Return the mean accepted tokens of a round; an extrapolation past `measured_levels`.

        Beyond the measured levels the rate starts at the lower of the last two, and falls from
        level to level by the ratio of the two if they fell. So it never exceeds the last measured
        rate. A single measured level tells nothing of a trend, and then deeper ones add nothing.

        Args:
            levels: Levels drafted per round.

        Examples:
            The rates .8, .6 fall by three quarters, so levels 3 and 4 have .45 and .3375:

            >>> acceptance = Acceptance((0.8, 0.8 + 0.8 * 0.6))
            >>> round(acceptance.mean_accepted(4), 4)
            1.5689
            >>> round(1.28 + 0.48 * 0.45 * (1 + 0.3375), 4)
            1.5689
        """
        known = self.measured_levels
        if levels <= known:
            return self.accepted[levels - 1]
        if known == 1:
            return self.accepted[0]
        above, last = self.rates[-2:]
        rate = min(above, last)
        ratio = rate / above if above else 0.0
        total = self.accepted[-1]
        reached = max(total - self.accepted[-2], 0.0)
        for _ in range(levels - known):
            rate *= ratio
            reached *= rate
            total += reached
        return total


@dataclass(frozen=True)
class DraftKind:
    """A draft's computation, whatever its placement; 1 layer per group is the exact draft."""

    lp_size: int = 1
    mlp_lp_size: int = 1
    refit: bool = False

    @property
    def label(self) -> str:
        """The kind in a few words.

        Examples:
            >>> DraftKind(lp_size=4, mlp_lp_size=2, refit=True).label
            'N=4 M=2 refit'
        """
        if self.lp_size == 1:
            return "exact"
        mlps = f" M={self.mlp_lp_size}" if self.mlp_lp_size > 1 else ""
        return f"N={self.lp_size}{mlps}{' refit' if self.refit else ''}"


@dataclass(frozen=True)
class MeasuredAcceptance:
    """Greedy acceptance of one pair's drafts.

    Attributes:
        file: Name of the file.
        target: The target's name, as the file has it.
        draft: The draft's.
        curves: Acceptance by kind of draft and tree width.
        left_out: Kinds in the file whose groups have more layers than the draft to plan for.
    """

    file: str
    target: str
    draft: str
    curves: Mapping[tuple[DraftKind, int], Acceptance]
    left_out: Sequence[DraftKind] = ()

    @property
    def kinds(self) -> list[DraftKind]:
        """The kinds of draft that have acceptance, in the file's order."""
        return list(dict.fromkeys(kind for kind, _ in self.curves))

    @property
    def tree_widths(self) -> list[int]:
        """The tree widths that have acceptance."""
        return sorted({width for _, width in self.curves})


def read_acceptance(path: Path, num_layers: int) -> MeasuredAcceptance:
    """Read greedy acceptance, calibrated where drafts are fuzzy.

    Args:
        path: What `experiments.acceptance` writes or `easyspec tune --json` prints.
        num_layers: Layers of the draft to plan for.

    Raises:
        EasySpecError: The file is neither, or has no acceptance that a plan can use.
    """
    if not path.exists():
        raise EasySpecError(f"`acceptance` {path} does not exist")
    found = read_json(path)
    try:
        rows = _of_experiment(found["results"]) if "results" in found else _of_tune(found)
        # Several placements of one draft have the same acceptance, so the first may stand.
        curves: dict[tuple[DraftKind, int], Acceptance] = {}
        for kind, width, acceptance in rows:
            _check(kind, width, acceptance)
            curves.setdefault((kind, width), acceptance)
        target, draft = str(found["target"]), str(found["draft"])
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        raise EasySpecError(
            f"`acceptance` {path} is neither the JSON of experiments.acceptance nor what this "
            "version's tune --json prints; measure with either"
        ) from None
    if not curves:
        raise EasySpecError(
            f"`acceptance` {path} has no acceptance of greedy decoding; measure at temperature 0"
        )
    fitting = {key: curve for key, curve in curves.items() if key[0].lp_size <= num_layers}
    if not fitting:
        raise EasySpecError(
            f"`acceptance` {path} has only groups of more layers than the draft's {num_layers}"
        )
    left_out = dict.fromkeys(kind for kind, _ in curves if kind.lp_size > num_layers)
    return MeasuredAcceptance(path.name, target, draft, fitting, list(left_out))


Measurement = tuple[DraftKind, int, Acceptance]
"""A draft, a tree width, and the acceptance measured for them."""


def _of_experiment(rows: Sequence[Mapping[str, Any]]) -> Iterator[Measurement]:
    """Yield the greedy, calibrated rows of experiments.acceptance."""
    for row in rows:
        if row["temperature"] == 0 and row["calibration"]:
            # "0,1-3x2,4-7x2" runs two MLPs at once.
            mlps = max(map(int, re.findall(r"x(\d+)", row["groups"])), default=1)
            kind = DraftKind(row["lp_size"], mlps, row.get("refit", False))
            positions = row["accepted_per_position"]
            yield kind, row["tree_width"], Acceptance.of_positions(positions, row["rounds"])


def _of_tune(found: Mapping[str, Any]) -> Iterator[Measurement]:
    """Yield what `tune` measured, which is greedy and calibrated."""
    for row in found["candidates"]:
        speculative, accepted = row["speculative"], row["accepted_by_levels"]
        if accepted is not None:
            kind = DraftKind()
            if speculative["method"] == "easyspec":
                refit = speculative["refit"] != "none"
                kind = DraftKind(speculative["lp_size"], speculative["mlp_lp_size"], refit)
            yield kind, speculative["tree_width"] or 1, Acceptance(tuple(accepted))


def _check(kind: DraftKind, width: int, acceptance: Acceptance) -> None:
    """Raise ValueError for figures that no measurement can give."""
    # An EasySpecError is a ValueError.
    SpeculativeConfig(
        num_speculative_tokens=acceptance.measured_levels,
        tree_width=width,
        lp_size=kind.lp_size,
        mlp_lp_size=kind.mlp_lp_size,
    )
    for levels, accepted in enumerate(acceptance.accepted, start=1):
        if not 0 <= accepted <= levels:
            raise ValueError(f"rounds of {levels} levels cannot accept {accepted}")
