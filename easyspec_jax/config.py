"""Frozen configurations: what a model is, how to speculate, how to sample."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from easyspec_jax.errors import EasySpecError

Method = Literal["vanilla", "sd", "tree", "easyspec"]
Verifier = Literal["rejection", "coupled"]
DraftTensorParallelSize = Literal["1", "all"]
Platform = Literal["cpu", "gpu", "tpu"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
FLOAT_DTYPES = get_args(DType)[1:]


@dataclass(frozen=True)
class Family:
    """What a `model_type` implies that its `config.json` does not say.

    qkv_bias: query, key and value projections carry a bias. qk_norm: each query and key head is normalised.
    rope_theta: the base where the configuration names none. head_dim: likewise; None is hidden_size over heads.
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: float = 10000.0
    head_dim: int | None = None


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen3": Family(qk_norm=True, head_dim=128),
}

MAX_WIDTH = 64
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
    """A decoder-only transformer of the Llama, Qwen2 or Qwen3 family; fields as in Hugging Face's `config.json`.

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
        family = _supported_family(config, model_type, origin)
        _check_types(config, origin)
        heads = int(config["num_attention_heads"])
        rope = _rope_parameters(config)
        result = ModelConfig(
            model_type=model_type,
            num_hidden_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            intermediate_size=int(config["intermediate_size"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or family.head_dim or int(config["hidden_size"]) // max(heads, 1)),
            vocab_size=int(config["vocab_size"]),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or family.rope_theta),
            rope_scaling=_rope_scaling(rope, origin),
            max_position_embeddings=int(config["max_position_embeddings"]),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            stop_ids=_stop_ids(generation or {}, origin) or _stop_ids(config, origin),
            dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch."),
        )
    except KeyError as missing:
        raise EasySpecError(f"{origin}: the field {missing} is missing; is this a complete checkpoint?") from None
    except EasySpecError:
        raise
    except (TypeError, ValueError, OverflowError) as wrong:
        raise EasySpecError(f"{origin}: a field has the wrong type ({wrong})") from None
    _check_values(result, origin)
    return result


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises EasySpecError, naming the file, if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EasySpecError(f"{path} is missing; expected a checkpoint directory with a config.json") from None
    except (OSError, ValueError, RecursionError) as error:
        raise EasySpecError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise EasySpecError(f"{path} holds no JSON object")
    return value


def _supported_family(config: dict[str, Any], model_type: str, origin: str) -> Family:
    """Raises EasySpecError for any feature that would silently give other text."""
    experts = next(
        (name for name in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(name)), None
    )
    if experts or "moe" in model_type or model_type == "mixtral":
        raise EasySpecError(f"{origin}: mixture-of-experts models (model_type {model_type!r}) are not supported")
    if model_type not in FAMILIES:
        raise EasySpecError(
            f"{origin}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}"
        )
    window = not model_type.startswith("qwen") and config.get("sliding_window")  # Qwen's counts if it is used
    if window or config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        raise EasySpecError(f"{origin}: sliding-window attention is not supported")
    for name, supported in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(name, supported) != supported:
            raise EasySpecError(f"{origin}: {name}={config[name]!r} is not supported (only {supported!r})")
    return FAMILIES[model_type]


def _check_types(config: dict[str, Any], origin: str) -> None:
    """Raises EasySpecError where a conversion would hide a mistake: int(2.5) is 2, bool("false") is True."""
    others: dict[str, type] = {"tie_word_embeddings": bool, "rope_scaling": dict, "rope_parameters": dict}
    for name, kind in (dict.fromkeys(_SIZES, int) | others).items():
        value = config.get(name)
        if value is not None and type(value) is not kind:
            raise EasySpecError(f"{origin}: {name}={value!r} has the wrong type; expected {kind.__name__}")


def _rope_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Both spellings: `rope_parameters` (transformers 5) and `rope_scaling` beside `rope_theta`, which wins."""
    return config.get("rope_scaling") or config.get("rope_parameters") or {}


def _rope_scaling(rope: dict[str, Any], origin: str) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise EasySpecError(f"{origin}: RoPE scaling {kind!r} is not supported; supported: default, llama3")
    return RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position_embeddings=int(rope["original_max_position_embeddings"]),
    )


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
            raise EasySpecError(f"{origin}: {name}={getattr(config, name)} must be at least 1 and below {limit}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise EasySpecError(
            f"{origin}: {config.num_attention_heads} query heads do not divide into "
            f"{config.num_key_value_heads} key-value heads"
        )
    if config.head_dim % 2:
        raise EasySpecError(f"{origin}: head_dim={config.head_dim} must be even for rotary embeddings")
    scaling = {} if config.rope_scaling is None else asdict(config.rope_scaling)
    for name, value in {"rms_norm_eps": config.rms_norm_eps, "rope_theta": config.rope_theta, **scaling}.items():
        if not 0 < value < float("inf"):
            raise EasySpecError(f"{origin}: {name}={value} must be positive and finite")
    if scaling and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:
        raise EasySpecError(f"{origin}: low_freq_factor must be below high_freq_factor")


@dataclass(frozen=True)
class SpeculativeConfig:
    """How a round drafts and verifies.

    num_speculative_tokens: levels drafted per round. tree_width: nodes a level, of which the best tree_nodes are
    verified; None stands for a chain, or 4 with method "tree", and for all of them. lp_size: layers a group, for the
    paper's grouping rule; lp_strategy: explicit groups such as "0,1-3,4-7", which override lp_size. calibration:
    rebuild exact draft KV every round. draft_tensor_parallel_size: whatever of the draft is not layer-parallel is
    replicated ("1") or split over all devices ("all"). verifier: None stands for rejection sampling of chains and
    coupled sampling of trees, which accept more on average.
    """

    method: Method = "easyspec"
    num_speculative_tokens: int = 5
    tree_width: int | None = None
    tree_nodes: int | None = None
    lp_size: int = 4
    lp_strategy: str | None = None
    calibration: bool = True
    draft_tensor_parallel_size: DraftTensorParallelSize = "all"
    verifier: Verifier | None = None

    def __post_init__(self) -> None:
        check_choice("method", self.method, get_args(Method))
        check_choice("verifier", self.chosen_verifier, get_args(Verifier))
        check_choice("draft-tensor-parallel-size", self.draft_tensor_parallel_size, get_args(DraftTensorParallelSize))
        if not 1 <= self.num_speculative_tokens <= 16:
            raise EasySpecError(f"--num-speculative-tokens {self.num_speculative_tokens} must be from 1 to 16")
        if not 1 <= self.width <= MAX_WIDTH:
            raise EasySpecError(f"--tree-width {self.tree_width} must be from 1 to {MAX_WIDTH}")
        if self.method in ("vanilla", "sd") and (self.width > 1 or self.tree_nodes is not None):
            raise EasySpecError(f"--method {self.method} grows no trees: leave out --tree-width and --tree-nodes")
        most = self.num_speculative_tokens * self.width
        if self.tree_nodes is not None and not 1 <= self.tree_nodes <= most:
            raise EasySpecError(f"--tree-nodes {self.tree_nodes} must be from 1 to the {most} nodes of the whole tree")
        if self.lp_size < 1:
            raise EasySpecError(f"--lp-size {self.lp_size} must be at least 1")

    @property
    def width(self) -> int:
        """Nodes drafted a level."""
        return self.tree_width if self.tree_width is not None else 4 if self.method == "tree" else 1

    @property
    def chosen_verifier(self) -> Verifier:
        """The verifier where the temperature is above 0."""
        if self.verifier is not None:
            return self.verifier
        return "rejection" if self.width == 1 else "coupled"


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen; the distribution that speculation preserves.

    temperature 0 is greedy. top_k and then top_p keep only the likeliest ids; 0 and 1 keep all. max_new_tokens counts
    generated tokens, the stop token included. seed: the request's noise, 0 <= seed < 2**32. stop: strings that end the
    text, which is cut before the one completed first.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-3 <= self.temperature < float("inf"):  # below, logits overflow float32
            raise EasySpecError(f"--temperature {self.temperature} must be 0 (greedy) or a number of at least 0.001")
        if not 0 <= self.top_k < 2**31:
            raise EasySpecError(f"--top-k {self.top_k} must be 0 (all) or a positive number of ids")
        if not 0 < self.top_p <= 1:
            raise EasySpecError(f"--top-p {self.top_p} must be a probability above 0, up to 1 (all)")
        if not 0 <= self.seed < 2**32:
            raise EasySpecError(f"--seed {self.seed} must be from 0 to {2**32 - 1}")
        if self.max_new_tokens < 1:
            raise EasySpecError(f"--max-new-tokens {self.max_new_tokens} must be at least 1")
        if isinstance(self.stop, str):
            raise EasySpecError("stop takes several strings: put one into a tuple")
        if not all(self.stop):
            raise EasySpecError("--stop '' would end every text; give at least one character")


def resolve_dtype(requested: DType, platform: str, config: ModelConfig) -> str:
    """The type to compute in: the one requested or, for "auto", the checkpoint's, but float32 on a CPU.

    Raises EasySpecError if that is none of FLOAT_DTYPES.
    """
    if requested != "auto":
        check_choice("dtype", requested, FLOAT_DTYPES)
        return requested
    if platform == "cpu":  # where XLA has no fast products of narrower types
        return "float32"
    if config.dtype not in FLOAT_DTYPES:
        raise EasySpecError(f"the checkpoint's dtype {config.dtype!r} is not supported; give --dtype")
    return config.dtype


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises EasySpecError if value is none of choices; name is the flag without dashes."""
    if value not in choices:
        raise EasySpecError(f"--{name} {value!r} is not one of {', '.join(choices)}")
