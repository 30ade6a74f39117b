"""Which layers of a draft go together.

A grouping rule is a function from (num_layers, lp_size) to groups; paper_groups is one.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from easyspec_jax.arithmetic import ceil_div
from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SpeculativeConfig

Group = range
"""Consecutive layers that run at once; a group of one is an ordinary layer."""


@dataclass(frozen=True)
class Layout:
    """Groups of a draft's layers, and how many MLPs of each group run at once.

    The attentions of a group always run at once.

    Attributes:
        groups: Every layer once, in order.
        mlp_lp_sizes: For each group, how many of its MLPs run at once.

    Examples:
        >>> layout = parse_layout("0,1-3,4-7x2,8", num_layers=9)
        >>> layout.lp_size, layout.sequential_mlps, layout.collectives
        (4, 7, 11)
    """

    groups: tuple[Group, ...]
    mlp_lp_sizes: tuple[int, ...]

    @classmethod
    def uniform(cls, groups: tuple[Group, ...], mlp_lp_size: int = 1) -> Self:
        """Run the same number of MLPs at once in every group that has as many."""
        return cls(groups, tuple(min(mlp_lp_size, len(group)) for group in groups))

    def __iter__(self) -> Iterator[tuple[Group, int]]:
        """Iterate over pairs of a group and how many of its MLPs run at once."""
        return zip(self.groups, self.mlp_lp_sizes, strict=True)

    @property
    def lp_size(self) -> int:
        """Number of layers of the largest group."""
        return max(map(len, self.groups), default=1)

    @property
    def sequential_mlps(self) -> int:
        """Number of steps in which a fuzzy pass runs its MLPs; those of one step run at once."""
        return sum(runs(len(group), mlps) for group, mlps in self)

    @property
    def collectives(self) -> int:
        """Number of all-reduces of a fuzzy pass through layers that are split over all devices.

        Each group needs one for its first attention outputs and one for each step of its MLPs.
        """
        return len(self.groups) + self.sequential_mlps


def runs(layers: int, mlp_lp_size: int) -> int:
    """Count the steps in which the MLPs of `layers` layers run, `mlp_lp_size` at a time.

    Examples:
        >>> runs(7, mlp_lp_size=3)
        3
    """
    return ceil_div(layers, mlp_lp_size)


def paper_groups(num_layers: int, lp_size: int) -> tuple[Group, ...]:
    """Group layers as the paper does (EasySpec, arXiv 2502.02493).

    Groups begin at multiples of lp_size; the first and the last layer are groups of their own.

    Args:
        num_layers: Layers of the draft.
        lp_size: Most layers of a group.

    Returns:
        The groups, in order.

    Examples:
        >>> format_layout(Layout.uniform(paper_groups(16, 4)))
        '0,1-3,4-7,8-11,12-14,15'
    """
    last = num_layers - 1
    # 16 layers, lp_size 4: {0, 1, 15} and {4, 8, 12} and {16}. Neighbours enclose a group.
    borders = sorted({0, min(1, last), last, *range(lp_size, last, lp_size), num_layers})
    return tuple(range(start, stop) for start, stop in itertools.pairwise(borders))


def layout_of(speculative: SpeculativeConfig, num_layers: int) -> Layout:
    """Group the layers of a draft as a configuration says.

    Args:
        speculative: Method "easyspec" forms groups, others leave every layer on its own. An
            explicit lp_strategy comes before lp_size.
        num_layers: Layers of the draft.

    Returns:
        The layout.

    Raises:
        EasySpecError: The draft cannot have the groups of lp_strategy.

    Examples:
        >>> format_layout(layout_of(SpeculativeConfig(lp_size=3), num_layers=8))
        '0,1-2,3-5,6,7'
        >>> format_layout(layout_of(SpeculativeConfig(method="sd"), num_layers=4))
        '0,1,2,3'
    """
    if speculative.method != "easyspec":
        return Layout.uniform(paper_groups(num_layers, 1))
    if speculative.lp_strategy is not None:
        return parse_layout(speculative.lp_strategy, num_layers, speculative.mlp_lp_size)
    return Layout.uniform(paper_groups(num_layers, speculative.lp_size), speculative.mlp_lp_size)


def parse_layout(strategy: str, num_layers: int, mlp_lp_size: int = 1) -> Layout:
    """Parse a layout, for example "0,1-3,4-7x2".

    Args:
        strategy: Groups, each a layer or a range of layers, with commas between them. "x2" after a
            group runs two of its MLPs at once.
        num_layers: Layers of the draft. The groups must name each of them once, in order.
        mlp_lp_size: How many MLPs run at once in groups that do not say so.

    Returns:
        The layout. Where a group is asked to run more MLPs than it has, it runs all of them.

    Raises:
        EasySpecError: The groups are malformed or do not name each layer once, in order.

    Examples:
        >>> layout = parse_layout("0,1-3,4-7x2", num_layers=8)
        >>> layout.groups
        (range(0, 1), range(1, 4), range(4, 8))
        >>> layout.mlp_lp_sizes
        (1, 1, 2)
    """
    groups, sizes = [], []
    for part in strategy.split(","):
        group, mlps = _parse_group(part.strip(), strategy)
        groups.append(group)
        # "x9" after a group of three means three.
        sizes.append(min(mlps or mlp_lp_size, len(group)))
    _check_partition(groups, strategy, num_layers)
    return Layout(tuple(groups), tuple(sizes))


def _check_partition(groups: list[Group], strategy: str, num_layers: int) -> None:
    """Raise EasySpecError, naming the layer, unless groups hold each layer once, in order."""
    # This check comes first: a range that passes it is short enough to be listed below.
    for group in groups:
        if group.stop > num_layers:
            raise EasySpecError(
                f"`lp_strategy` {strategy!r} names layer {group.stop - 1}; "
                f"the draft has 0 to {num_layers - 1}"
            )
    named = list(itertools.chain.from_iterable(groups))
    for layer in named:
        if named.count(layer) > 1:
            raise EasySpecError(f"`lp_strategy` {strategy!r} names layer {layer} twice")
    for layer in range(num_layers):
        if layer not in named:
            raise EasySpecError(
                f"`lp_strategy` {strategy!r} leaves out layer {layer} of 0 to {num_layers - 1}"
            )
    if named != sorted(named):
        raise EasySpecError(f"`lp_strategy` {strategy!r} does not name the layers in order")


def format_layout(layout: Layout) -> str:
    """Format a layout as parse_layout() reads it.

    Examples:
        >>> format_layout(Layout((range(0, 1), range(1, 4)), (1, 2)))
        '0,1-3x2'
    """
    return ",".join(
        format_group(group) + (f"x{mlps}" if mlps > 1 else "") for group, mlps in layout
    )


def format_group(group: Group) -> str:
    """Format a group by its first and last layer, or its only one.

    Examples:
        >>> format_group(range(4, 8)), format_group(range(8, 9))
        ('4-7', '8')
    """
    return str(group.start) if len(group) == 1 else f"{group.start}-{group.stop - 1}"


def _parse_group(part: str, strategy: str) -> tuple[Group, int | None]:
    """Parse one group, and how many of its MLPs run at once if it says so."""
    # 18 digits keep ranges within what len() can count.
    match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?(?:x([1-9]\d{0,17}))?", part)
    if match is None:
        raise EasySpecError(
            f"`lp_strategy` {strategy!r}: {part!r} is neither a layer nor a range "
            'such as "4-7" or "4-7x2"'
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise EasySpecError(f"`lp_strategy` {strategy!r}: the range {part!r} runs backwards")
    return range(first, last + 1), int(match[3]) if match[3] else None


def slots_per_device(group: Group, layer_axis: int) -> int:
    """Return how many attentions of a group each position of the layer axis holds.

    Slots are filled in order, so those of the last positions may stay empty.

    Args:
        group: The group.
        layer_axis: Length of the mesh's layer axis.

    Examples:
        >>> slots_per_device(range(1, 8), layer_axis=4)  # 2 + 2 + 2 + 1
        2
    """
    return ceil_div(len(group), layer_axis)


def position_of(layer: int, group: Group, layer_axis: int) -> int:
    """Return the position on the layer axis that holds the attention of one of a group's layers.

    Examples:
        >>> [position_of(layer, range(1, 8), layer_axis=4) for layer in range(1, 8)]
        [0, 0, 1, 1, 2, 2, 3]
    """
    return (layer - group.start) // slots_per_device(group, layer_axis)
