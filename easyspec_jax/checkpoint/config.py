"""Model configuration: a frozen dataclass, read from a `config.json`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from easyspec_jax.checkpoint.families import FAMILIES, Family
from easyspec_jax.errors import EasySpecError

LARGEST_JSON = 16 << 20
"""Bytes of a file that is read as JSON: parsed, it takes many times as much memory."""

_INT32 = 2**31
_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
          "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")  # fmt: skip


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency-dependent RoPE scaling; lengths in tokens."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of one of FAMILIES; fields as in Hugging Face's `config.json`.

    vocab_size counts embedding rows, which may exceed the tokenizer's ids. stop_ids ends a text.
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
    """The configuration in `config.json` and `generation_config.json` of a checkpoint directory.

    Raises EasySpecError if either file is unreadable or describes a model this package cannot run.
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
    """A ModelConfig from the contents of `config.json` and `generation_config.json`.

    origin names the source in error messages. Raises EasySpecError for unsupported or contradictory models.
    """
    try:
        model_type = str(config.get("model_type", "(none)"))
        family = _family(config, model_type, origin)
        _check_types(config, origin)
        config = family.read_config(config)
        _refuse_unsupported(config, origin)
        heads = int(config["num_attention_heads"])
        rope = _rope_parameters(config)
        result = ModelConfig(
            model_type=model_type,
            num_hidden_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(
                config.get("head_dim") or _divided(int(config["hidden_size"]), heads, origin)
            ),
            vocab_size=int(config["vocab_size"]),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope, origin),
            max_position_embeddings=int(config["max_position_embeddings"]),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.has("self_attn.q_proj.bias"),
            qk_norm=family.has("self_attn.q_norm.weight"),
            stop_ids=_stop_ids(generation or {}, origin) or _stop_ids(config, origin),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix(
                "torch."
            ),
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
    """The object in a JSON file. Raises EasySpecError, naming the file, if there is none."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_JSON + 1)
        if len(content) > LARGEST_JSON:
            raise EasySpecError(
                f"{path} is larger than the {LARGEST_JSON >> 20} MiB of any proper one"
            )
        value = json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise EasySpecError(
            f"{path} is missing; expected a checkpoint directory with a config.json"
        ) from None
    except EasySpecError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise EasySpecError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise EasySpecError(f"{path} holds no JSON object")
    return value


def _family(config: dict[str, Any], model_type: str, origin: str) -> Family:
    experts = next(
        (
            name
            for name in ("num_local_experts", "num_experts", "n_routed_experts")
            if config.get(name)
        ),
        None,
    )
    if experts or "moe" in model_type or model_type == "mixtral":
        raise EasySpecError(
            f"{origin}: mixture-of-experts models (model_type {model_type!r}) are not supported"
        )
    if model_type not in FAMILIES:
        raise EasySpecError(
            f"{origin}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def _refuse_unsupported(config: dict[str, Any], origin: str) -> None:
    """Raises EasySpecError for what would give another text; config is in Llama's terms."""
    # A window as long as the model's positions never hides a token.
    window = config.get("sliding_window") or config["max_position_embeddings"]
    if window < config["max_position_embeddings"] or "sliding_attention" in (
        config.get("layer_types") or ()
    ):
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
    """Raises EasySpecError where a conversion would hide a mistake: int(2.5) is 2, bool("false") is True."""
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
    """Either spelling: `rope_parameters` (transformers 5), or `rope_scaling` with `rope_theta`, which wins.

    As in transformers, an `original_max_position_embeddings` next to them counts before one inside.
    """
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
    """Whether a scaling leaves every frequency, and the size of attention's logits, as it is: by a factor of 1."""
    by_one = rope.get("factor") == 1 and rope.get("attention_factor") in (None, 1)
    return by_one and kind in ("linear", "dynamic", "yarn")


def _stop_ids(config: dict[str, Any], origin: str) -> tuple[int, ...]:
    ids = config.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(type(i) is not int or not 0 <= i < _INT32 for i in ids):
        raise EasySpecError(
            f"{origin} or the generation_config.json beside it: eos_token_id={config['eos_token_id']!r} is no token id "
            "and no list of them"
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
    for name, value in {
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        **scaling,
    }.items():
        if not 0 < value < float("inf"):
            raise EasySpecError(f"{origin}: {name}={value} must be positive and finite")
    if scaling and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise EasySpecError(f"{origin}: low_freq_factor must be below high_freq_factor")
