"""Kinds of layers: how each rotates queries and keys, and how far back it reads."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from easyspec_jax.checkpoint.rope import Fields, Rope, read_rope
from easyspec_jax.errors import EasySpecError

FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class LayerKind:
    """Rotation and window of an attention layer; layers of one kind share both.

    Attributes:
        rope: Rotation of queries and keys.
        window: How many tokens a token reads, itself included; None for all before it.
    """

    rope: Rope
    window: int | None = None


def read_layer_kinds(config: Fields, head_dim: int, origin: str) -> tuple[LayerKind, ...]:
    """Read the kind of every layer.

    Args:
        config: The contents of `config.json` in Llama's terms. Without `layer_types`, all layers
            slide if there is a `sliding_window`.
        head_dim: Channels of a head.
        origin: Names the source in error messages.

    Raises:
        EasySpecError: A kind is not supported, or contradictory.
        KeyError: A field is missing.
        TypeError: A field has the wrong type.
    """
    window = config.get("sliding_window") or None
    if window is not None and window < 1:
        raise EasySpecError(f"{origin}: sliding_window={window} must be at least 1")
    types = _layer_types(config, window, origin)
    ropes = _ropes(config, types, head_dim, origin)
    if window is None and SLIDING in types:
        raise EasySpecError(f"{origin}: layer_types has {SLIDING!r} but sliding_window is not set")
    # A window as long as the context never hides a token.
    if window is not None and window >= longest_text(
        ropes.values(), config["max_position_embeddings"]
    ):
        window = None
    kinds = {
        FULL: LayerKind(ropes[FULL]),
        SLIDING: LayerKind(ropes[SLIDING], window),
    }
    return tuple(kinds[name] for name in types)


def longest_text(ropes: Iterable[Rope], positions: int) -> int:
    """Return the most tokens of a text that rotations allow.

    Args:
        ropes: The rotations.
        positions: The configuration's `max_position_embeddings`.
    """
    scalings = [rope.scaling for rope in ropes]
    return min(positions if own is None else own.longest(positions) for own in scalings)


def _layer_types(config: Fields, window: int | None, origin: str) -> Sequence[str]:
    """Return the type of each layer, as transformers names them."""
    layers = config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:
        return [FULL if window is None else SLIDING] * layers
    for name in types:
        if name not in (FULL, SLIDING):
            raise EasySpecError(
                f"{origin}: layer_types has {name!r}, which is not supported; "
                f"supported: {FULL}, {SLIDING}"
            )
    if len(types) != layers:
        raise EasySpecError(f"{origin}: layer_types has {len(types)} entries for {layers} layers")
    return types


def _ropes(config: Fields, types: Sequence[str], head_dim: int, origin: str) -> dict[str, Rope]:
    """Return the rotation of each type of layer; the configuration may have one for both."""
    # transformers 5 writes rope_parameters; older versions write rope_scaling, with rope_theta
    # next to it. The older spelling wins if both are there.
    fields = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not any(isinstance(fields.get(name), dict) for name in (FULL, SLIDING)):
        return dict.fromkeys((FULL, SLIDING), read_rope(fields, config, head_dim, origin))
    used = set(types)
    for name in used:
        if not isinstance(fields.get(name), dict):
            raise EasySpecError(f"{origin}: rope_parameters has nothing for layers of {name!r}")
    # Original lengths are among each type's fields then, never next to them.
    config = {k: v for k, v in config.items() if k != "original_max_position_embeddings"}
    ropes = {name: read_rope(fields[name], config, head_dim, origin) for name in used}
    if len({rope.dim for rope in ropes.values()}) > 1:
        raise EasySpecError(
            f"{origin}: layers that rotate different numbers of channels are not supported"
        )
    some = next(iter(ropes.values()))
    return {FULL: some, SLIDING: some} | ropes
