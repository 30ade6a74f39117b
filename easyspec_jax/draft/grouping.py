"""Which layers go together. A new rule is a function from (num_layers, lp_size) to groups."""

import itertools
import re
from dataclasses import dataclass

from easyspec_jax.errors import EasySpecError
from easyspec_jax.options import SpeculativeConfig

Group = range
"""Consecutive layers that run at once; a group of one is an ordinary layer."""


@dataclass(frozen=True)
class Layout:
    """What of a draft runs at once: the attentions of each group, and mlp_lp_size of its MLPs at a time."""

    groups: tuple[Group, ...]
    mlp_lp_size: int = 1

    @property
    def lp_size(self) -> int:
        """Layers of the largest group."""
        return max(map(len, self.groups), default=1)


def paper_groups(num_layers: int, lp_size: int) -> tuple[Group, ...]:
    """The paper's rule (EasySpec, arXiv 2502.02493): borders at multiples of lp_size, first and last layer alone."""
    last = num_layers - 1
    borders = sorted({0, min(1, last), last, *range(lp_size, last, lp_size), num_layers})
    return tuple(range(a, b) for a, b in itertools.pairwise(borders))


def layout_of(speculative: SpeculativeConfig, num_layers: int) -> Layout:
    """What of a draft of so many layers runs at once. Raises EasySpecError for groups that it cannot have."""
    if speculative.method != "easyspec":
        return Layout(paper_groups(num_layers, 1))
    if speculative.lp_strategy is not None:
        return Layout(parse_groups(speculative.lp_strategy, num_layers), speculative.mlp_lp_size)
    return Layout(paper_groups(num_layers, speculative.lp_size), speculative.mlp_lp_size)


def parse_groups(strategy: str, num_layers: int) -> tuple[Group, ...]:
    """Groups from "0,1-3,4-7,…", which must name each layer once, in order.

    Raises EasySpecError, naming the layer, if they do not.
    """
    groups = tuple(_parse_group(part.strip(), strategy) for part in strategy.split(","))
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
            raise EasySpecError(f"--lp-strategy {strategy!r} leaves out layer {layer} of 0 to {num_layers - 1}")
    if named != sorted(named):
        raise EasySpecError(f"--lp-strategy {strategy!r} does not name the layers in order")
    return groups


def format_groups(groups: tuple[Group, ...]) -> str:
    """The inverse of parse_groups."""
    return ",".join(str(g.start) if len(g) == 1 else f"{g.start}-{g.stop - 1}" for g in groups)


def _parse_group(part: str, strategy: str) -> Group:
    match = re.fullmatch(r"(\d{1,18})(?:-(\d{1,18}))?", part)
    if match is None:
        raise EasySpecError(f'--lp-strategy {strategy!r}: {part!r} is neither a layer nor a range such as "4-7"')
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise EasySpecError(f"--lp-strategy {strategy!r}: the range {part!r} runs backwards")
    return range(first, last + 1)


def slots_per_device(group: Group, layer_axis: int) -> int:
    """Attentions of a group that each position of the layer axis holds, the last ones' perhaps empty."""
    return -(-len(group) // layer_axis)


def position_of(layer: int, group: Group, layer_axis: int) -> int:
    """The position on the layer axis that holds the attention of one of a group's layers."""
    return (layer - group.start) // slots_per_device(group, layer_axis)
