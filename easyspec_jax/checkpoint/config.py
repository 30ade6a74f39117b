"""Model configuration: a frozen dataclass, read from `config.json`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from easyspec_jax.checkpoint.families import FAMILIES, Family
from easyspec_jax.errors import EasySpecError

LARGEST_JSON = 16 << 20
"""Largest JSON file that is read, in bytes: parsed, it takes many times as much memory."""

_INT32 = 2**31
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent RoPE scaling, see `checkpoint.rope`.

    Attributes:
        factor: Low frequencies are divided by this.
        low_freq_factor: Frequencies that turn fewer times than this within the original context
            are low.
        high_freq_factor: Frequencies that turn more often than this are left alone.
        original_max_position_embeddings: The original context, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of one of FAMILIES. Fields are named as in `config.json`.

    Attributes:
        vocab_size: Rows of the embedding, which may exceed the number of token ids.
        rope_scaling: None if the frequencies are not scaled.
        max_position_embeddings: The longest text the model was made for, in tokens.
        qkv_bias: Queries, keys and values have a bias.
        qk_norm: Queries and keys are normalised, head by head.
        stop_ids: Token ids that end a text.
        dtype: NumPy's name of the dtype that the weights are meant to be stored in.
    """

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    stop_ids: tuple[int, ...]
    dtype: str


def read_model_config(directory: Path | str) -> ModelConfig:
    """Read `config.json` and `generation_config.json` of a checkpoint directory.

    Raises:
        EasySpecError: A file cannot be read, or describes a model that is not supported.

    Examples:
        >>> from easyspec_jax import demo
        >>> read_model_config(demo.TARGET).hidden_size
        384
    """
    directory = Path(directory)
    generation = directory / "generation_config.json"
    return model_config(
        read_json(directory / "config.json"),
        read_json(generation) if generation.exists() else {},
        origin=str(directory / "config.json"),
    )


def model_config(
    config: dict[str, Any], generation: dict[str, Any] | None = None, origin: str = "config"
) -> ModelConfig:
    """Make a ModelConfig from the contents of the two JSON files.

    Args:
        config: The contents of `config.json`.
        generation: The contents of `generation_config.json`, whose stop ids win.
        origin: Names the source in error messages.

    Raises:
        EasySpecError: The model is not supported, or its fields are missing or contradictory.
    """
    try:
        model_type = str(config.get("model_type", "(none)"))
        family = _family(config, model_type, origin)
        _check_types(config, origin)
        config = family.read_config(config)
        _refuse_unsupported(config, origin)
        heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        rope = _rope_parameters(config)
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        result = ModelConfig(
            model_type=model_type,
            num_hidden_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or _divided(hidden, heads, origin)),
            vocab_size=int(config["vocab_size"]),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope, origin),
            max_position_embeddings=int(config["max_position_embeddings"]),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.has("self_attn.q_proj.bias"),
            qk_norm=family.has("self_attn.q_norm.weight"),
            stop_ids=_stop_ids(generation or {}, origin) or _stop_ids(config, origin),
            dtype=dtype.removeprefix("torch."),
        )
    except KeyError as missing:
        raise EasySpecError(
            f"{origin}: the field {missing} is missing; is this a complete checkpoint?"
        ) from None
    except EasySpecError:
        raise
    except (TypeError, ValueError, OverflowError) as wrong:
        raise EasySpecError(f"{origin}: a field has the wrong type ({wrong})") from None
    _check_values(result, origin)
    return result


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        EasySpecError: The file is missing, too large or not a JSON object.
    """
    try:
        # The size is checked while reading: a stat() could be out of date, and says 0 for a pipe.
        with path.open("rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise EasySpecError(
                f"{path} is larger than {LARGEST_JSON >> 20} MiB, the limit for JSON files"
            )
        value = json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise EasySpecError(
            f"{path} is missing; expected a checkpoint directory with a config.json"
        ) from None
    except EasySpecError:
        raise
    # Python's parser recurses: a file of a few hundred thousand "[" is a RecursionError.
    except (OSError, ValueError, RecursionError) as error:
        raise EasySpecError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise EasySpecError(f"{path} must hold a JSON object")
    return value


def _family(config: dict[str, Any], model_type: str, origin: str) -> Family:
    # Some mixtures of experts keep the model_type of their dense siblings and add a field.
    has_experts = any(map(config.get, _EXPERTS))
    if has_experts or "moe" in model_type or model_type == "mixtral":
        raise EasySpecError(
            f"{origin}: mixture-of-experts models (model_type {model_type!r}) are not supported"
        )
    if model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise EasySpecError(
            f"{origin}: model_type {model_type!r} is not supported; supported: {supported}"
        )
    return FAMILIES[model_type]


def _refuse_unsupported(config: dict[str, Any], origin: str) -> None:
    """Raise EasySpecError for fields that change a text; config is in Llama's terms."""
    longest = config["max_position_embeddings"]
    # A window as long as the context never hides a token.
    window = config.get("sliding_window") or longest
    if window < longest or "sliding_attention" in (config.get("layer_types") or ()):
        raise EasySpecError(f"{origin}: sliding-window attention is not supported")
    for name, supported in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(name, supported) != supported:
            raise EasySpecError(
                f"{origin}: {name}={config[name]!r} is not supported (only {supported!r})"
            )


def _divided(hidden: int, heads: int, origin: str) -> int:
    if heads > 0 and hidden % heads:
        raise EasySpecError(
            f"{origin}: hidden_size={hidden} does not divide into {heads} heads; give it a head_dim"
        )
    return hidden // max(heads, 1)


def _check_types(config: dict[str, Any], origin: str) -> None:
    """Raise EasySpecError for types that a conversion would accept but change."""
    # int(2.5) is 2, and bool("false") is True. JSON's true must not pass as 1 either, which is
    # why the exact type is compared: isinstance(True, int) holds.
    others: dict[str, type] = {
        "tie_word_embeddings": bool,
        "rope_scaling": dict,
        "rope_parameters": dict,
        "sliding_window": int,
        "max_window_layers": int,
    }
    for name, kind in (dict.fromkeys(_SIZES, int) | others).items():
        value = config.get(name)
        if value is not None and type(value) is not kind:
            raise EasySpecError(
                f"{origin}: {name}={value!r} has the wrong type; expected {kind.__name__}"
            )


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return the RoPE fields in either spelling, as transformers resolves them."""
    # transformers 5 writes rope_parameters; older versions write rope_scaling, with rope_theta
    # next to it. The older spelling wins if both are there, and original_max_position_embeddings
    # next to them wins over the one inside.
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    original = config.get("original_max_position_embeddings")
    return rope if original is None else rope | {"original_max_position_embeddings": original}


def _rope_scaling(rope: dict[str, Any], origin: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" or _scales_nothing(kind, rope):
        return None
    if kind != "llama3":
        raise EasySpecError(
            f"{origin}: RoPE scaling {kind!r} is not supported; supported: default, llama3"
        )
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


def _scales_nothing(kind: str, rope: dict[str, Any]) -> bool:
    """Whether a scaling by 1 leaves the frequencies and the attention's logits unchanged."""
    by_one = rope.get("factor") == 1 and rope.get("attention_factor") in (None, 1)
    return by_one and kind in ("linear", "dynamic", "yarn")


def _stop_ids(config: dict[str, Any], origin: str) -> tuple[int, ...]:
    ids = config.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(type(i) is not int or not 0 <= i < _INT32 for i in ids):
        raise EasySpecError(
            f"{origin} or the generation_config.json next to it: "
            f"eos_token_id={config['eos_token_id']!r} must be a token id or a list of token ids"
        )
    return tuple(ids)


def _check_values(config: ModelConfig, origin: str) -> None:
    limits = dict.fromkeys(_SIZES, _INT32) | {"num_hidden_layers": 10_000}
    for name, limit in limits.items():
        if not 1 <= getattr(config, name) < limit:
            raise EasySpecError(
                f"{origin}: {name}={getattr(config, name)} must be at least 1 and below {limit}"
            )
    if config.num_attention_heads % config.num_key_value_heads:
        raise EasySpecError(
            f"{origin}: {config.num_attention_heads} query heads do not divide into "
            f"{config.num_key_value_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise EasySpecError(
            f"{origin}: head_dim={config.head_dim} must be even for rotary embeddings"
        )
    scaling = {} if config.rope_scaling is None else asdict(config.rope_scaling)
    positive = {"rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta, **scaling}
    for name, value in positive.items():
        # Written so that NaN, which Python's JSON parser accepts, fails as well.
        if not 0 < value < float("inf"):
            raise EasySpecError(f"{origin}: {name}={value} must be positive and finite")
    if scaling and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise EasySpecError(f"{origin}: low_freq_factor must be below high_freq_factor")
