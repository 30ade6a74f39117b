"""Rotary position embedding (RoPE): what `config.json` says of it, and the frequencies that follow.

A scaling stretches a model made for an `original` length to longer texts. Two kinds, `dynamic` and
`longrope`, depend on a text's length. transformers takes the length so far, so that keys that are
cached early were rotated otherwise than later ones. Here the most tokens that any text may have
decide once, when the pair is opened (`at_length`): a text never depends on how it was cut into
passes, and equals transformers' wherever that text is as long.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from jaxtyping import Float

from easyspec_jax.errors import EasySpecError

Fields = Mapping[str, Any]
Frequencies = Float[np.ndarray, " half"]
"""Rotation of each pair of channels in radians per position, from fast to slow."""


@dataclass(frozen=True)
class RopeScaling:
    """A change of the frequencies. This class is the base of all kinds."""

    @property
    def amplitude(self) -> float:
        """Factor of all sines and cosines, and so of queries and keys."""
        return 1.0

    def scaled(self, theta: float, dim: int) -> Frequencies:
        """Return the frequencies.

        Args:
            theta: Base of the exponential.
            dim: Channels of a head that turn.
        """
        raise NotImplementedError

    def at_length(self, tokens: int) -> Self:
        """Return the scaling for texts of up to some tokens."""
        return self

    def ordinary_length(self, positions: int) -> int:
        """Return the tokens that a text may have unless more are asked for.

        Args:
            positions: The configuration's `max_position_embeddings`.
        """
        return positions

    def longest(self, positions: int) -> int:
        """Return the most tokens that may be asked for; `positions` as above."""
        return positions


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """All frequencies are divided by the factor."""

    factor: float

    def scaled(self, theta: float, dim: int) -> Frequencies:
        return plain_frequencies(theta, dim) / self.factor

    def longest(self, positions: int) -> int:
        # Some configurations give the positions before the scaling, others those after it.
        return max(positions, int(positions * self.factor))


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """The base grows with the length of texts beyond the original one (NTK-aware scaling).

    Attributes:
        factor: How fast it grows; up to the original length nothing changes.
        original: The original length, in tokens.
        length: The most tokens of a text.
    """

    factor: float
    original: int
    length: int

    def scaled(self, theta: float, dim: int) -> Frequencies:
        longer = self.factor * max(self.length, self.original) / self.original
        return plain_frequencies(theta * (longer - (self.factor - 1)) ** (dim / (dim - 2)), dim)

    def at_length(self, tokens: int) -> Self:
        return replace(self, length=tokens)

    def ordinary_length(self, positions: int) -> int:
        return max(positions, self.length)

    def longest(self, positions: int) -> int:
        return max(positions, int(positions * self.factor))


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """Low frequencies are divided by the factor, high ones kept (YaRN, arXiv 2309.00071).

    Attributes:
        factor: Low frequencies are divided by this.
        original: The original length, in tokens.
        beta_fast: Frequencies that turn more often than this within it are kept.
        beta_slow: Frequencies that turn fewer times than this are divided.
        truncate: Whether the blend between these two starts and ends at whole pairs of channels.
        attention_factor: The amplitude.
    """

    factor: float
    original: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def scaled(self, theta: float, dim: int) -> Frequencies:
        def pair(rotations: float) -> float:
            """Return the number of the pair that turns this often within the original length."""
            ratio = self.original / (rotations * 2 * math.pi)
            return dim * math.log(ratio) / (2 * math.log(theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dim - 1)
        last += 0.001 if first == last else 0  # transformers' way to avoid dividing by zero
        divide = np.clip((np.arange(dim // 2) - first) / (last - first), 0.0, 1.0)
        return plain_frequencies(theta, dim) * (divide / self.factor + 1 - divide)

    def longest(self, positions: int) -> int:
        return max(positions, int(self.original * self.factor))


@dataclass(frozen=True)
class LongRopeScaling(RopeScaling):
    """Each frequency is divided by a factor of its own; long texts have other factors (LongRoPE).

    Attributes:
        short_factor: Factors where no text exceeds the original length.
        long_factor: Factors where texts may.
        original: The original length, in tokens.
        attention_factor: The amplitude, for short and long texts alike.
        is_long: Which of the factors hold.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original: int
    attention_factor: float
    is_long: bool = False

    @property
    def amplitude(self) -> float:
        return self.attention_factor

    def scaled(self, theta: float, dim: int) -> Frequencies:
        factors = self.long_factor if self.is_long else self.short_factor
        return plain_frequencies(theta, dim) / np.array(factors)

    def at_length(self, tokens: int) -> Self:
        return replace(self, is_long=tokens > self.original)

    def ordinary_length(self, positions: int) -> int:
        # Short texts are what most have, and the short factors suit them.
        return positions if self.is_long else min(positions, self.original)


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Low frequencies are divided by the factor (the model card of Llama 3.1).

    Attributes:
        factor: Low frequencies are divided by this.
        low_freq_factor: Frequencies that turn fewer times than this within the original length
            are low.
        high_freq_factor: Frequencies that turn more often than this are left alone.
        original: The original length, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original: int

    def scaled(self, theta: float, dim: int) -> Frequencies:
        frequencies = plain_frequencies(theta, dim)
        # `rotations` counts full turns within the original length. Between the two bounds the
        # results are blended linearly.
        rotations = self.original * frequencies / (2 * math.pi)
        band = self.high_freq_factor - self.low_freq_factor
        keep = np.clip((rotations - self.low_freq_factor) / band, 0.0, 1.0)
        return frequencies * (keep + (1 - keep) / self.factor)


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of layer.

    Attributes:
        theta: Base of the exponential.
        dim: Channels of a head that turn: the first ones.
        scaling: None if the frequencies are not scaled.

    Examples:
        >>> Rope(10000.0, 4, LinearScaling(2.0)).frequencies().tolist()
        [0.5, 0.004999999888241291]
    """

    theta: float
    dim: int
    scaling: RopeScaling | None = None

    def frequencies(self) -> Frequencies:
        """Return the rotation of each pair of channels, float32 [dim / 2], from fast to slow."""
        if self.scaling is None:
            return plain_frequencies(self.theta, self.dim).astype(np.float32)
        return self.scaling.scaled(self.theta, self.dim).astype(np.float32)

    @property
    def amplitude(self) -> float:
        """Factor of all sines and cosines."""
        return 1.0 if self.scaling is None else self.scaling.amplitude

    def at_length(self, tokens: int) -> "Rope":
        """Return the rotation for texts of up to some tokens."""
        return (
            self if self.scaling is None else replace(self, scaling=self.scaling.at_length(tokens))
        )


def plain_frequencies(theta: float, dim: int) -> Frequencies:
    """Return the frequencies without a scaling, float64 [dim / 2]."""
    return theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)


def read_rope(fields: Fields, config: Fields, head_dim: int, origin: str) -> Rope:
    """Read the rotation of one kind of layer.

    Args:
        fields: Its `rope_parameters`, or `rope_scaling`.
        config: The contents of `config.json`, which has what these leave out.
        head_dim: Channels of a head.
        origin: Names the source in error messages.

    Raises:
        EasySpecError: The scaling is not supported, or impossible.
        KeyError: A field is missing.
        TypeError: A field has the wrong type.
    """
    read = _Reader(fields, config, origin)
    theta = read.number("rope_theta", config.get("rope_theta") or 10000.0)
    part = read.number("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    dim = int(head_dim * part)
    if not 2 <= dim <= head_dim or dim % 2:
        raise EasySpecError(
            f"{origin}: partial_rotary_factor={part} would rotate {dim} of {head_dim} channels; "
            "expected an even number"
        )
    kind = fields.get("rope_type", fields.get("type")) or "default"
    if kind == "default" or _scales_nothing(kind, fields):
        return Rope(theta, dim)
    if kind not in _READERS:
        supported = ", ".join(("default", *_READERS))
        raise EasySpecError(
            f"{origin}: RoPE scaling {kind!r} is not supported; supported: {supported}"
        )
    try:
        with np.errstate(all="raise"):
            scaling = _READERS[kind](read, dim)
            scaling.longest(read.positions)  # a huge factor has no number of tokens
            rope = Rope(theta, dim, scaling)
            rope.frequencies()
    except ArithmeticError:
        raise EasySpecError(
            f"{origin}: the frequencies of RoPE scaling {kind!r} cannot be computed"
        ) from None
    return rope


def _scales_nothing(kind: str, fields: Fields) -> bool:
    """Whether a scaling by 1 leaves the frequencies and the attention's logits unchanged."""
    by_one = fields.get("factor") == 1 and fields.get("attention_factor") in (None, 1)
    return by_one and kind in ("linear", "dynamic", "yarn")


@dataclass(frozen=True)
class _Reader:
    """Reads the fields of a scaling; see read_rope()."""

    fields: Fields
    config: Fields
    origin: str

    @property
    def positions(self) -> int:
        return self.config["max_position_embeddings"]

    def number(self, name: str, default: float | None = None) -> float:
        value = self.fields.get(name)
        value = default if value is None else value
        if value is None:
            raise KeyError(name)
        return self._checked(name, value)

    def original(self) -> int:
        """Return the length that the model was made for before the scaling."""
        # Next to the scaling's fields it wins over the one among them, as in transformers.
        name = "original_max_position_embeddings"
        return int(self._checked(name, self.config.get(name) or self.number(name, self.positions)))

    def factors(self, name: str, count: int) -> tuple[float, ...]:
        values = self.fields[name]
        if not isinstance(values, list) or len(values) != count:
            raise EasySpecError(f"{self.origin}: {name} must be a list of {count} numbers")
        return tuple(self._checked(name, value) for value in values)

    def _checked(self, name: str, value: Any) -> float:
        if type(value) not in (int, float):
            raise TypeError(f"{name}={value!r}")
        # Written so that NaN, which Python's JSON parser accepts, fails as well.
        if not 0 < value < math.inf:
            raise EasySpecError(f"{self.origin}: {name}={value} must be positive and finite")
        return float(value)


def _linear(read: _Reader, dim: int) -> RopeScaling:
    return LinearScaling(read.number("factor"))


def _dynamic(read: _Reader, dim: int) -> RopeScaling:
    return DynamicScaling(read.number("factor"), original=read.positions, length=read.positions)


def _yarn(read: _Reader, dim: int) -> RopeScaling:
    original = read.original()
    # A null factor means the ratio of the lengths; a missing one is a mistake.
    if "factor" not in read.fields:
        raise KeyError("factor")
    factor = read.number("factor", read.positions / original)

    def of_scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    amplitude = of_scale(1.0)
    if read.fields.get("mscale") and read.fields.get("mscale_all_dim"):
        amplitude = of_scale(read.number("mscale")) / of_scale(read.number("mscale_all_dim"))
    return YarnScaling(
        factor=factor,
        original=original,
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        truncate=bool(read.fields.get("truncate", True)),
        attention_factor=read.number("attention_factor", amplitude),
    )


def _longrope(read: _Reader, dim: int) -> RopeScaling:
    original = read.original()
    factor = read.number("factor", read.positions / original)
    amplitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRopeScaling(
        short_factor=read.factors("short_factor", dim // 2),
        long_factor=read.factors("long_factor", dim // 2),
        original=original,
        attention_factor=read.number("attention_factor", amplitude),
    )


def _llama3(read: _Reader, dim: int) -> RopeScaling:
    low, high = read.number("low_freq_factor"), read.number("high_freq_factor")
    if not low < high:
        raise EasySpecError(f"{read.origin}: low_freq_factor must be below high_freq_factor")
    return Llama3Scaling(read.number("factor"), low, high, read.original())


_READERS = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
