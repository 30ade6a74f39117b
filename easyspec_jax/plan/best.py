"""The best way of decoding by measured acceptance: levels, width, groups, MLPs and placement.

Acceptance says how many tokens a round of any depth yields, and traces say how long it takes. So
every number of levels of every draft in the file can be compared, as estimates.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from easyspec_jax.options import MAX_LEVELS, DraftTensorParallelSize, Method
from easyspec_jax.parallel.mesh import parse_mesh
from easyspec_jax.plan.acceptance import Acceptance, DraftKind, MeasuredAcceptance
from easyspec_jax.plan.machines import Machine
from easyspec_jax.plan.steps import MakeMesh, Pair, Round, Way, rounds
from easyspec_jax.progress import Bar, no_bar


@dataclass(frozen=True)
class Choice:
    """A way of decoding with everything that a round needs, and its estimated speed.

    Attributes:
        levels: Levels drafted per round.
        extrapolated: Whether acceptance was not measured for as many levels.
        tokens: Tokens that a round yields on average, the target's own included.
        seconds: Time of a round.
        memory: Bytes of weights and caches per device.
        fits: Whether the device has as many; None for a CPU.
    """

    way: Way
    tree_width: int
    levels: int
    extrapolated: bool
    tokens: float
    seconds: float
    memory: int
    fits: bool | None

    @property
    def tokens_per_second(self) -> float:
        """Speed of one stream."""
        return self.tokens / self.seconds

    @property
    def rank(self) -> tuple[bool, float]:
        """Key that orders by speed; whatever does not fit comes last."""
        return self.fits is not False, self.tokens_per_second


@dataclass(frozen=True)
class Best:
    """Choices by measured acceptance.

    Attributes:
        measured: The file.
        by_depth: For each way and tree width the choices of 1, 2, … levels; the fastest way first.
        at_levels: The fastest choice with as many levels as the plan's other tables have.
    """

    measured: MeasuredAcceptance
    by_depth: Sequence[Sequence[Choice]]
    at_levels: Choice

    @property
    def choices(self) -> list[Choice]:
        """The fastest choice of each way and tree width, best first."""
        return [fastest(depths) for depths in self.by_depth]


def fastest(choices: Sequence[Choice]) -> Choice:
    """Return the fastest choice, the shallowest of equals; one that fits, if any does."""
    return max(choices, key=lambda choice: choice.rank)


def find_best(
    pair: Pair,
    measured: MeasuredAcceptance,
    make_mesh: MakeMesh,
    machine: Machine,
    bar: Bar = no_bar,
) -> Best:
    """Estimate the speed of every draft, tree width, placement and number of levels.

    Args:
        pair: The pair; its number of levels decides `Best.at_levels`, its tree width nothing.
        measured: Acceptance; what it lacks is not considered.
        make_mesh: Makes a mesh.
        machine: The device.
        bar: Shows progress.
    """
    devices = parse_mesh(pair.mesh).size
    todo = []
    for (kind, width), acceptance in measured.curves.items():
        todo += [(way, width, acceptance) for way in _ways(kind, width, devices)]
    by_depth = []
    with bar("Choosing", len(todo)) as advance:
        for way, width, acceptance in todo:
            counted = rounds(replace(pair, tree_width=width), way, make_mesh, MAX_LEVELS)
            by_depth.append(choices(way, width, acceptance, counted, machine))
            advance(1)
    by_depth.sort(key=lambda depths: fastest(depths).rank, reverse=True)
    at_levels = fastest([depths[pair.num_speculative_tokens - 1] for depths in by_depth])
    return Best(measured, by_depth, at_levels)


def _ways(kind: DraftKind, width: int, devices: int) -> list[Way]:
    """Return a kind of draft with each placement that could be the best."""
    ordinary: Method = "sd" if width == 1 else "tree"
    method = "easyspec" if kind.lp_size > 1 else ordinary
    sizes: tuple[DraftTensorParallelSize, ...] = ("1", "all")
    # On one device both mean the same. And without collectives, MLPs gain nothing by running at
    # once.
    if devices == 1 or kind.mlp_lp_size > 1:
        sizes = ("all",)
    return [Way(method, kind.lp_size, size, kind.mlp_lp_size, kind.refit) for size in sizes]


def choices(
    way: Way, width: int, acceptance: Acceptance, counted: Sequence[Round], machine: Machine
) -> list[Choice]:
    """Combine measured acceptance with counted rounds.

    Args:
        way: A way of decoding.
        width: Nodes per level.
        acceptance: Its acceptance.
        counted: Rounds of 1, 2, … levels.
        machine: The device.

    Returns:
        A choice for each of the rounds.
    """
    found = []
    for levels, one in enumerate(counted, start=1):
        choice = Choice(
            way=way,
            tree_width=width,
            levels=levels,
            extrapolated=levels > acceptance.measured_levels,
            tokens=1 + acceptance.mean_accepted(levels),
            seconds=one.cost.seconds(machine),
            memory=one.memory,
            fits=machine.fits(one.memory),
        )
        found.append(choice)
    return found
