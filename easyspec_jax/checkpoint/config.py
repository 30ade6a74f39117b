"""Model configuration: a frozen dataclass, read from `config.json`."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self, get_args

from easyspec_jax.checkpoint.families import FAMILIES, SINKS, Family, QKNorm
from easyspec_jax.checkpoint.layer_kinds import LayerKind, longest_text, read_layer_kinds
from easyspec_jax.errors import EasySpecError

LARGEST_JSON = 16 << 20
"""Largest JSON file that is read, in bytes: parsed, it takes many times as much memory."""

_INT32 = 2**31
_MOST_LAYERS = 10_000
_MOST_EXPERTS = 1 << 20  # of all layers
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
Activation = Literal["silu", "gelu_pytorch_tanh", "clamped_swiglu"]
"""Supported functions of the gate of a feed-forward part; the last one is gpt-oss's."""

VARIATIONS: dict[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "attention_multiplier": None,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "norm_offset": 0.0,
    "sliding_window": None,
    "layer_types": None,
}
"""Fields of `config.json` in which families differ, with the values that Llama has."""

_MULTIPLIERS = (
    "attention_multiplier",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_multiplier",
    "residual_multiplier",
    "logits_scaling",
)
_EXPERT_SIZES = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class MixtureConfig:
    """Mixtures of experts: feed-forward parts of which each token uses a few.

    Fields are named as in Qwen's `config.json`.

    Attributes:
        num_experts: Experts of a layer.
        num_experts_per_tok: How many of them a token uses: those that the router scores highest.
        moe_intermediate_size: Inner size of an expert.
        norm_topk_prob: Whether the weights of a token's experts are scaled to sum to 1.
        dense_layers: Layers that have one feed-forward part instead, in order.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    dense_layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer of one of FAMILIES. Fields are named as in `config.json`.

    Attributes:
        vocab_size: Rows of the embedding, which may exceed the number of token ids.
        layers: Kind of each layer, which says how it rotates and how far back it reads.
        max_position_embeddings: The longest text the model was made for, in tokens.
        hidden_act: Function of the gate of feed-forward parts.
        attention_bias: Attention has biases where the family's table says so.
        mlp_bias: Likewise feed-forward parts.
        attention_sinks: Each head has a score that no token belongs to.
        qk_norm: Norms of queries and keys.
        pre_norm: Attentions and feed-forward parts read normed hidden states.
        post_norm: Their outputs are normed before they are added.
        norm_offset: Added to the weights of norms.
        attention_multiplier: Multiplies scores; None for head_dim ** -0.5.
        attn_logit_softcapping: Largest score, reached by tanh; None for no cap.
        final_logit_softcapping: Likewise the largest logit.
        embedding_multiplier: Multiplies embeddings.
        residual_multiplier: Multiplies what is added to hidden states.
        logits_scaling: Divides logits.
        stop_ids: Token ids that end a text.
        dtype: NumPy's name of the dtype that the weights are meant to be stored in.
        mixture: Mixtures of experts; None if every layer has one feed-forward part.
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
    layers: tuple[LayerKind, ...]
    max_position_embeddings: int
    tie_word_embeddings: bool
    hidden_act: Activation
    attention_bias: bool
    mlp_bias: bool
    attention_sinks: bool
    qk_norm: QKNorm
    pre_norm: bool
    post_norm: bool
    norm_offset: float
    attention_multiplier: float | None
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    embedding_multiplier: float
    residual_multiplier: float
    logits_scaling: float
    stop_ids: tuple[int, ...]
    dtype: str
    mixture: MixtureConfig | None = None

    @cached_property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The different kinds of layers, in the order of their first layers."""
        return tuple(dict.fromkeys(self.layers))

    def kind_of(self, layer: int) -> int:
        """Return the number of a layer's kind among `kinds`."""
        return self.kinds.index(self.layers[layer])

    @property
    def has_windows(self) -> bool:
        """Whether some layers read only the last tokens."""
        return any(kind.window is not None for kind in self.kinds)

    def at_length(self, tokens: int) -> Self:
        """Return the model for texts of up to some tokens; see `checkpoint.rope`."""
        return replace(
            self,
            layers=tuple(replace(kind, rope=kind.rope.at_length(tokens)) for kind in self.layers),
        )

    @property
    def ordinary_length(self) -> int:
        """Tokens that a text may have unless more are asked for."""
        scalings = [kind.rope.scaling for kind in self.kinds if kind.rope.scaling is not None]
        positions = self.max_position_embeddings
        return min([positions, *(own.ordinary_length(positions) for own in scalings)])

    @property
    def longest_text(self) -> int:
        """The most tokens of a text that may be asked for."""
        return longest_text([kind.rope for kind in self.kinds], self.max_position_embeddings)


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
        # Before a list of them is made.
        _check_size("num_hidden_layers", config["num_hidden_layers"], _MOST_LAYERS, origin)
        _refuse_window_of_llama(config, model_type, origin)
        config = _in_terms_of_llama(config, family, origin)
        _refuse_activation(config, origin)
        heads = int(config["num_attention_heads"])
        head_dim = _head_dim(config, origin)
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        result = ModelConfig(
            model_type=model_type,
            num_hidden_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=head_dim,
            vocab_size=int(config["vocab_size"]),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            layers=read_layer_kinds(config, head_dim, origin),
            max_position_embeddings=int(config["max_position_embeddings"]),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            hidden_act=config.get("hidden_act", "silu"),
            attention_bias=bool(config["attention_bias"]),
            mlp_bias=bool(config["mlp_bias"]),
            attention_sinks=family.has(SINKS),
            qk_norm=family.qk_norm,
            pre_norm=family.has("input_layernorm.weight"),
            post_norm=family.has("self_attn.output_norm.weight"),
            norm_offset=float(config["norm_offset"]),
            attention_multiplier=_optional(config["attention_multiplier"]),
            attn_logit_softcapping=_optional(config["attn_logit_softcapping"]),
            final_logit_softcapping=_optional(config["final_logit_softcapping"]),
            embedding_multiplier=float(config["embedding_multiplier"]),
            residual_multiplier=float(config["residual_multiplier"]),
            logits_scaling=float(config["logits_scaling"]),
            stop_ids=_stop_ids(generation or {}, origin) or _stop_ids(config, origin),
            dtype=dtype.removeprefix("torch."),
            mixture=_mixture(config) if family.has_experts else None,
        )
    except KeyError as missing:
        raise EasySpecError(
            f"{origin}: the field {missing} is missing; is this a complete checkpoint?"
        ) from None
    except EasySpecError:
        raise
    except (TypeError, ValueError, ArithmeticError) as wrong:
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
    family = FAMILIES.get(model_type)
    # Some mixtures of experts keep the model_type of their dense siblings and add a field.
    has_experts = any(map(config.get, _EXPERTS)) or "moe" in model_type
    if has_experts and not (family and family.has_experts):
        raise EasySpecError(
            f"{origin}: mixture-of-experts models of model_type {model_type!r} are not supported"
        )
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise EasySpecError(
            f"{origin}: model_type {model_type!r} is not supported; supported: {supported}"
        )
    return family


def _in_terms_of_llama(config: dict[str, Any], family: Family, origin: str) -> dict[str, Any]:
    """Let a family read its configuration, with Llama's values for what it leaves open."""
    known = {}
    for name, value in config.items():
        if name not in VARIATIONS or name in family.fields:
            known[name] = value
    try:
        return VARIATIONS | family.read_config(known)
    except EasySpecError as error:
        raise EasySpecError(f"{origin}: {error}") from None


def _refuse_window_of_llama(config: dict[str, Any], model_type: str, origin: str) -> None:
    """Raise EasySpecError for a window that transformers and llama.cpp ignore."""
    window = config.get("sliding_window")
    if model_type == "llama" and window and window < config["max_position_embeddings"]:
        # It may have a meaning all the same: Mistral is the same model with windows.
        raise EasySpecError(
            f"{origin}: sliding_window={window} has no meaning for model_type 'llama'; "
            "set model_type to 'mistral', or remove it"
        )


def _refuse_activation(config: dict[str, Any], origin: str) -> None:
    if (activation := config.get("hidden_act", "silu")) not in get_args(Activation):
        supported = ", ".join(get_args(Activation))
        raise EasySpecError(
            f"{origin}: hidden_act={activation!r} is not supported; supported: {supported}"
        )


def _mixture(config: dict[str, Any]) -> MixtureConfig:
    """Read the mixture of experts; config is in Qwen's terms."""
    layers, step = int(config["num_hidden_layers"]), int(config.get("decoder_sparse_step", 1))
    listed = config.get("mlp_only_layers") or ()
    # With a step of 2 layers 1, 3, 5, ... are mixtures.
    sparse = range(step - 1, layers, step)
    return MixtureConfig(
        num_experts=int(config["num_experts"]),
        num_experts_per_tok=int(config.get("num_experts_per_tok", 8)),
        moe_intermediate_size=int(config["moe_intermediate_size"]),
        norm_topk_prob=bool(config.get("norm_topk_prob", False)),
        dense_layers=tuple(n for n in range(layers) if n not in sparse or n in listed),
    )


def _optional(value: Any) -> float | None:
    return None if value is None else float(value)


def _head_dim(config: dict[str, Any], origin: str) -> int:
    """Return the channels of a head, checked before frequencies are computed for them."""
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    head_dim = config.get("head_dim")
    if not head_dim:
        if heads > 0 and hidden % heads:
            raise EasySpecError(
                f"{origin}: hidden_size={hidden} does not divide into {heads} heads; "
                "give it a head_dim"
            )
        head_dim = hidden // max(heads, 1)
    _check_size("head_dim", head_dim, _INT32, origin)
    if head_dim % 2:
        raise EasySpecError(f"{origin}: head_dim={head_dim} must be even for rotary embeddings")
    return head_dim


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
        "attention_bias": bool,
        "mlp_bias": bool,
        "layer_types": list,
        "norm_topk_prob": bool,
        "mlp_only_layers": list,
    }
    others |= dict.fromkeys((*_EXPERT_SIZES, "num_local_experts", "decoder_sparse_step"), int)
    for name, kind in (dict.fromkeys(_SIZES, int) | others).items():
        value = config.get(name)
        if value is not None and type(value) is not kind:
            raise EasySpecError(
                f"{origin}: {name}={value!r} has the wrong type; expected {kind.__name__}"
            )


def _stop_ids(config: dict[str, Any], origin: str) -> tuple[int, ...]:
    ids = config.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if any(type(i) is not int or not 0 <= i < _INT32 for i in ids):
        raise EasySpecError(
            f"{origin} or the generation_config.json next to it: "
            f"eos_token_id={config['eos_token_id']!r} must be a token id or a list of token ids"
        )
    return tuple(ids)


def _check_size(name: str, value: int, limit: int, origin: str) -> None:
    if not 1 <= value < limit:
        raise EasySpecError(f"{origin}: {name}={value} must be at least 1 and below {limit}")


def _check_experts(mixture: MixtureConfig, layers: int, origin: str) -> None:
    for name in _EXPERT_SIZES:
        _check_size(name, getattr(mixture, name), _INT32, origin)
    # Their tensors are listed one by one.
    if layers * mixture.num_experts > _MOST_EXPERTS:
        raise EasySpecError(
            f"{origin}: {mixture.num_experts} experts in {layers} layers are more than "
            f"{_MOST_EXPERTS}"
        )
    if mixture.num_experts_per_tok > mixture.num_experts:
        raise EasySpecError(
            f"{origin}: num_experts_per_tok={mixture.num_experts_per_tok} is more than "
            f"the {mixture.num_experts} experts that there are"
        )


def _check_values(config: ModelConfig, origin: str) -> None:
    for name in _SIZES:
        _check_size(name, getattr(config, name), _INT32, origin)
    if config.mixture is not None:
        _check_experts(config.mixture, config.num_hidden_layers, origin)
    if config.num_attention_heads % config.num_key_value_heads:
        raise EasySpecError(
            f"{origin}: {config.num_attention_heads} query heads do not divide into "
            f"{config.num_key_value_heads} key-value heads"
        )
    # Written so that NaN, which Python's JSON parser accepts, fails as well.
    if not 0 < config.rms_norm_eps < float("inf"):
        raise EasySpecError(
            f"{origin}: rms_norm_eps={config.rms_norm_eps} must be positive and finite"
        )
    for name in _MULTIPLIERS:
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise EasySpecError(f"{origin}: {name}={value} must be positive and finite")
