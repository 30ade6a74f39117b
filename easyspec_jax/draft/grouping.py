"""Which layers go together. A new rule is a function from (num_layers, lp_size) to groups."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SpeculativeConfig

Group = range
"""Consecutive layers that run at once; a group of one is an ordinary layer."""


@dataclass(frozen=True)
class Layout:
    """Layers of a draft that run at once: the attentions of each group, and some of its MLPs at a time."""

    groups: tuple[Group, ...]
    mlp_lp_sizes: tuple[int, ...]

    @classmethod
    def uniform(cls, groups: tuple[Group, ...], mlp_lp_size: int = 1) -> Self:
        """As many MLPs at a time in every group."""
        return cls(groups, tuple(min(mlp_lp_size, len(group)) for group in groups))

    def __iter__(self) -> Iterator[tuple[Group, int]]:
        """Each group, and how many of its MLPs run at a time."""
        return zip(self.groups, self.mlp_lp_sizes, strict=True)

    @property
    def lp_size(self) -> int:
        """Layers of the largest group."""
        return max(map(len, self.groups), default=1)

    @property
    def sequential_mlps(self) -> int:
        """MLPs, or those that run at once, one after another in a fuzzy pass."""
        return sum(runs(len(group), mlps) for group, mlps in self)

    @property
    def collectives(self) -> int:
        """All-reduces of a fuzzy pass through layers that are split over all devices."""
        return len(self.groups) + self.sequential_mlps


def runs(layers: int, mlp_lp_size: int) -> int:
    """Count the turns in which the MLPs of `layers` layers run, `mlp_lp_size` at a time."""
    return -(-layers // mlp_lp_size)


def paper_groups(num_layers: int, lp_size: int) -> tuple[Group, ...]:
    """The paper's rule (EasySpec, arXiv 2502.02493): borders at multiples of lp_size, first and last layer alone."""
    last = num_layers - 1
    borders = sorted({0, min(1, last), last, *range(lp_size, last, lp_size), num_layers})
    return tuple(range(a, b) for a, b in itertools.pairwise(borders))


def layout_of(speculative: SpeculativeConfig, num_layers: int) -> Layout:
    """Group the layers of a draft. Raises EasySpecError for groups that it cannot have."""
    if speculative.method != "easyspec":
        return Layout.uniform(paper_groups(num_layers, 1))
    if speculative.lp_strategy is not None:
        return parse_layout(speculative.lp_strategy, num_layers, speculative.mlp_lp_size)
    return Layout.uniform(paper_groups(num_layers, speculative.lp_size), speculative.mlp_lp_size)


def parse_layout(strategy: str, num_layers: int, mlp_lp_size: int = 1) -> Layout:
    """A layout from "0,1-3,4-7x2,…", where "x2" says how many MLPs at a time; elsewhere it is mlp_lp_size.

    The groups must name each layer once, in order. Raises EasySpecError, naming the layer, if they do not.
    """
    parts = [_parse_group(part.strip(), strategy) for part in strategy.split(",")]
    groups = tuple(group for group, _ in parts)
    for group in groups:
        if group.stop > num_layers:
            raise EasySpecError(
                f"--lp-strategy {strategy!r} names layer {group.stop - 1}; the draft has 0 to {num_layers - 1}"
            )
    named = [layer for group in groups for layer in group]
    for layer in named:
        if named.count(layer) > 1:
            raise EasySpecError(f"--lp-strategy {strategy!r} names layer {layer} twice")
    for layer in range(num_layers):
        if layer not in named:
            raise EasySpecError(
                f"--lp-strategy {strategy!r} leaves out layer {layer} of 0 to {num_layers - 1}"
            )
    if named != sorted(named):
        raise EasySpecError(f"--lp-strategy {strategy!r} does not name the layers in order")
    return Layout(groups, tuple(min(mlps or mlp_lp_size, len(group)) for group, mlps in parts))


def format_layout(layout: Layout) -> str:
    """The inverse of parse_layout."""
    return ",".join(
        format_group(group) + (f"x{mlps}" if mlps > 1 else "") for group, mlps in layout
    )


def format_group(group: Group) -> str:
    """Such as "4-7", or "8"."""
    return str(group.start) if len(group) == 1 else f"{group.start}-{group.stop - 1}"


def _parse_group(part: str, strategy: str) -> tuple[Group, int | None]:
    """A group, and its MLPs at a time if it says so."""
    match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?(?:x([1-9]\d{0,17}))?", part)
    if match is None:
        raise EasySpecError(
            f'--lp-strategy {strategy!r}: {part!r} is neither a layer nor a range such as "4-7" or "4-7x2"'
        )
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise EasySpecError(f"--lp-strategy {strategy!r}: the range {part!r} runs backwards")
    return range(first, last + 1), int(match[3]) if match[3] else None


def slots_per_device(group: Group, layer_axis: int) -> int:
    """Attentions of a group that each position of the layer axis holds, the last ones' perhaps empty."""
    return -(-len(group) // layer_axis)


def position_of(layer: int, group: Group, layer_axis: int) -> int:
    """The position on the layer axis that holds the attention of one of a group's layers."""
    return (layer - group.start) // slots_per_device(group, layer_axis)
