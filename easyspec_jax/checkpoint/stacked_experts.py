"""Experts whose tensors a file keeps as one for all of a layer, as gpt-oss does.

In E = model.layers.N.mlp.experts, rows of gate and up take turns, and matrices are transposed:

    E.gate_up_proj       [experts, hidden, 2 * inner]
    E.gate_up_proj_bias  [experts, 2 * inner]
    E.down_proj          [experts, inner, hidden]
    E.down_proj_bias     [experts, hidden]

Here each expert has tensors of its own, such as E.3.gate_proj.weight [inner, hidden].
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from easyspec_jax.checkpoint.tensors import Slices, TensorSource

_OF_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")
_STACKS = {
    "gate": ("gate_up_proj", 0, 2),
    "up": ("gate_up_proj", 1, 2),
    "down": ("down_proj", 0, 1),
}


@dataclass(frozen=True)
class Place:
    """The place of one expert's tensor in the stack of all.

    Attributes:
        stack: Name of the stacked tensor; that of a bias ends in "_bias".
        expert: Number of the expert.
        first: Its first output there.
        step: Distance of its outputs.
        is_bias: Whether it is a bias.
    """

    stack: str
    expert: int
    first: int
    step: int
    is_bias: bool

    def outputs(self, rows: slice) -> slice:
        """Return the stack's outputs that hold some rows: every `step`-th of them, from `first`."""
        return slice(rows.start * self.step, rows.stop * self.step)


def places(known: Collection[str]) -> Iterator[tuple[str, Place]]:
    """Yield each tensor of an expert, and where it would be if it were stacked.

    Args:
        known: The tensors of a model.

    Examples:
        >>> ((_, place),) = places(["model.layers.0.mlp.experts.3.up_proj.bias"])
        >>> place.stack, place.expert, place.first, place.step
        ('model.layers.0.mlp.experts.gate_up_proj_bias', 3, 1, 2)
    """
    for name in known:
        if found := _OF_EXPERT.fullmatch(name):
            stack, first, step = _STACKS[found[3]]
            is_bias = found[4] == "bias"
            whole = f"{found[1]}.{stack}" + ("_bias" if is_bias else "")
            yield name, Place(whole, int(found[2]), first, step, is_bias)


def stacks_of(known: Collection[str]) -> frozenset[str]:
    """Return the tensors that a file may have instead of those of experts."""
    return frozenset(place.stack for _, place in places(known))


def unstacked(source: TensorSource, known: Collection[str]) -> TensorSource:
    """Present the experts of a source one by one where it has them stacked.

    A stack that is too short or of other dimensions lacks the tensors that it cannot have.

    Args:
        source: The tensors as they are stored.
        known: The tensors that the model has.
    """
    shapes, found = source.shapes(), dict[str, Place]()
    for name, place in places(known):
        shape = shapes.get(place.stack, ())
        if len(shape) == (2 if place.is_bias else 3) and place.expert < shape[0]:
            found[name] = place
    return Unstacked(source, found) if found else source


@dataclass(frozen=True)
class Unstacked:
    """A source with a tensor of its own for each expert's part.

    Attributes:
        below: The source in which they are stacked.
        places: Where each is.
    """

    below: TensorSource
    places: Mapping[str, Place]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def dtypes(self) -> Mapping[str, str]:
        return self._dtypes

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        place = self.places.get(name)
        if place is None:
            return self.below.read(name, window)
        whole = tuple(slice(0, size) for size in self._shapes[name])
        rows, *columns = (*window, *whole[len(window) :])
        expert = slice(place.expert, place.expert + 1)
        stored = self.below.read(place.stack, (expert, *columns, place.outputs(rows)))
        # [1, inputs, outputs] -> [rows, inputs], or [1, outputs] -> [rows]
        return stored[0, ..., place.first :: place.step].T

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        below = self.below.shapes()
        shapes = self._others(below)
        for name, place in self.places.items():
            _, *inputs, outputs = below[place.stack]
            shapes[name] = (outputs // place.step, *inputs)
        return shapes

    @cached_property
    def _dtypes(self) -> dict[str, str]:
        below = self.below.dtypes()
        return self._others(below) | {name: below[own.stack] for name, own in self.places.items()}

    def _others(self, of_all: Mapping[str, Any]) -> dict[str, Any]:
        stacks = {place.stack for place in self.places.values()}
        return {name: each for name, each in of_all.items() if name not in stacks}
