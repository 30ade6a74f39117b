"""Model families: for each, a table of tensors and a reader of `config.json`.

docs/families.md shows how to add one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from easyspec_jax.checkpoint.layer_kinds import FULL, SLIDING
from easyspec_jax.errors import EasySpecError

QKNorm = Literal["none", "head", "full"]
"""Which norm queries and keys get: none, one of each head, or one over all heads."""

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True)
class Tensor:
    """A canonical tensor, with the name and layout of Llama in Hugging Face.

    Attributes:
        name: Its name; `{}` stands for the layer's number, and a second one for the expert's.
        shape: Its dimensions by name, see `canonical.sizes`.
        gguf: Its name in GGUF files; empty if they do not have it.
        hf: Its name in Hugging Face files, if other than `name`.
        after: If several tensors are stored as one, the dimensions of those whose rows come
            before it. Phi-3 stores queries, keys and values as `qkv_proj`; there the values come
            after ("queries", "keys").
        pairs: The field of ModelConfig that counts its heads, if GGUF permutes the rows of each
            head for its rotary embedding (see `canonical.unpermute`); otherwise empty.
        when: The flag of ModelConfig that says whether models have it; empty if all do.
        gguf_offset: GGUF files store it with this added: 1 for the norms of Gemma.
        mixture: Whether it belongs to layers with a mixture of experts (True), to those with one
            feed-forward part (False), or to all (None).
    """

    name: str
    shape: tuple[str, ...]
    gguf: str = ""
    hf: str = ""
    after: tuple[str, ...] = ()
    pairs: str = ""
    when: str = ""
    gguf_offset: float = 0.0
    mixture: bool | None = None


@dataclass(frozen=True)
class Family:
    """Definition of a `model_type`.

    Attributes:
        models: Models of it, for people to read.
        tensors: Every tensor, the untied head included.
        read_config: Translates the contents of `config.json` into Llama's terms, with the
            family's defaults filled in.
        class_name: The class of transformers.
        gguf: The architecture that GGUF files name; empty for none.
        fields: Fields that only some families know. In the `config.json` of a family that does
            not list them, they mean nothing; its reader may still add them.
        stacks_experts: Files have one tensor for all experts of a layer, see `stacked_experts`.
    """

    models: str
    tensors: tuple[Tensor, ...]
    read_config: Callable[[dict[str, Any]], dict[str, Any]]
    class_name: str
    gguf: str = ""
    fields: tuple[str, ...] = ()
    stacks_experts: bool = False

    @property
    def qk_norm(self) -> QKNorm:
        """Norms of queries and keys.

        Examples:
            >>> FAMILIES["qwen3"].qk_norm
            'head'
        """
        for tensor in self.tensors:
            if tensor.name.endswith("self_attn.q_norm.weight"):
                return "head" if tensor.shape == ("head_dim",) else "full"
        return "none"

    def has(self, name: str) -> bool:
        """Whether layers have this tensor.

        Examples:
            >>> FAMILIES["qwen3"].has("self_attn.q_norm.weight")
            True
        """
        return any(tensor.name == f"model.layers.{{}}.{name}" for tensor in self.tensors)

    @property
    def has_experts(self) -> bool:
        """Whether layers may have a mixture of experts."""
        return self.has(ROUTER)


ROUTER = "mlp.gate.weight"
"""The matrix that scores experts, as it is called in a layer."""

SINKS = "self_attn.sinks"
"""Each head's score that no token belongs to, likewise."""


def _layer(name: str, shape: tuple[str, ...], gguf: str) -> Tensor:
    return Tensor(f"model.layers.{{}}.{name}", shape, f"blk.{{}}.{gguf}")


QUERIES = _layer("self_attn.q_proj.weight", ("queries", "hidden"), "attn_q.weight")
KEYS = _layer("self_attn.k_proj.weight", ("keys", "hidden"), "attn_k.weight")

PRE_NORMS = (
    _layer("input_layernorm.weight", ("hidden",), "attn_norm.weight"),
    # Llama's name, although it is the norm before the feed-forward part.
    _layer("post_attention_layernorm.weight", ("hidden",), "ffn_norm.weight"),
)

POST_NORMS = (
    replace(
        _layer("self_attn.output_norm.weight", ("hidden",), "post_attention_norm.weight"),
        hf="model.layers.{}.post_attention_layernorm.weight",
    ),
    replace(
        _layer("mlp.output_norm.weight", ("hidden",), "post_ffw_norm.weight"),
        hf="model.layers.{}.post_feedforward_layernorm.weight",
    ),
)

_BODY = (
    Tensor(EMBEDDING, ("vocab", "hidden"), "token_embd.weight"),
    Tensor(FINAL_NORM, ("hidden",), "output_norm.weight"),
    _layer("self_attn.v_proj.weight", ("keys", "hidden"), "attn_v.weight"),
    _layer("self_attn.o_proj.weight", ("hidden", "queries"), "attn_output.weight"),
    Tensor(HEAD, ("vocab", "hidden"), "output.weight"),
)
"""Tensors of every family. Queries and keys are missing, because GGUF stores them in two ways."""

MLP = (
    _layer("mlp.gate_proj.weight", ("inner", "hidden"), "ffn_gate.weight"),
    _layer("mlp.up_proj.weight", ("inner", "hidden"), "ffn_up.weight"),
    _layer("mlp.down_proj.weight", ("hidden", "inner"), "ffn_down.weight"),
)
"""One feed-forward part."""

BODY = (*_BODY, *MLP)
"""Tensors of every family without experts, but for queries and keys."""

COMMON = (*BODY, *PRE_NORMS)


def experts(
    module: str = "mlp",
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    router: str = "gate",
    biases: bool = False,
) -> tuple[Tensor, ...]:
    """Return the tensors of a mixture of experts.

    Args:
        module: Hugging Face's name of the mixture.
        parts: Its names of an expert's gate, up and down projections.
        router: Its name of the matrix that scores experts.
        biases: Whether all of them have biases.
    """
    scores = Tensor(
        f"model.layers.{{}}.{ROUTER}",
        ("experts", "hidden"),
        hf=f"model.layers.{{}}.{module}.{router}.weight",
        mixture=True,
    )
    found = [scores]
    for tensor, part in zip(MLP, parts, strict=True):
        of_expert = Tensor(
            tensor.name.replace("mlp.", "mlp.experts.{}."),
            tuple("expert_inner" if size == "inner" else size for size in tensor.shape),
            hf=f"model.layers.{{}}.{module}.experts.{{}}.{part}.weight",
            mixture=True,
        )
        found.append(of_expert)
    return (*found, *map(_bias_of, found)) if biases else tuple(found)


def _bias_of(weight: Tensor) -> Tensor:
    """Return the bias of a matrix's outputs."""
    name, hf = (own.removesuffix("weight") + "bias" for own in (weight.name, weight.hf))
    return replace(weight, name=name, hf=hf, shape=weight.shape[:1])


QKV_BIASES = (
    _layer("self_attn.q_proj.bias", ("queries",), "attn_q.bias"),
    _layer("self_attn.k_proj.bias", ("keys",), "attn_k.bias"),
    _layer("self_attn.v_proj.bias", ("keys",), "attn_v.bias"),
)

HEAD_NORMS = (
    _layer("self_attn.q_norm.weight", ("head_dim",), "attn_q_norm.weight"),
    _layer("self_attn.k_norm.weight", ("head_dim",), "attn_k_norm.weight"),
)


def _when(tensors: tuple[Tensor, ...], flag: str) -> tuple[Tensor, ...]:
    return tuple(replace(tensor, when=flag) for tensor in tensors)


ATTENTION_BIASES = _when(
    (*QKV_BIASES, _layer("self_attn.o_proj.bias", ("hidden",), "attn_output.bias")),
    "attention_bias",
)
MLP_BIASES = _when(
    (
        _layer("mlp.gate_proj.bias", ("inner",), "ffn_gate.bias"),
        _layer("mlp.up_proj.bias", ("inner",), "ffn_up.bias"),
        _layer("mlp.down_proj.bias", ("hidden",), "ffn_down.bias"),
    ),
    "mlp_bias",
)

# llama.cpp rotates neighbouring channels for Llama and the two halves of a head for Qwen, so only
# Llama's query and key rows are permuted in GGUF files.
MISTRAL = (
    *COMMON,
    replace(QUERIES, pairs="num_attention_heads"),
    replace(KEYS, pairs="num_key_value_heads"),
)


def _permuted(bias: Tensor) -> Tensor:
    """Permute a bias in GGUF as the weight that it belongs to."""
    weights = {tensor.name.removesuffix("weight"): tensor.pairs for tensor in MISTRAL}
    return replace(bias, pairs=weights[bias.name.removesuffix("bias")])


LLAMA = (*MISTRAL, *map(_permuted, ATTENTION_BIASES), *MLP_BIASES)
QWEN2 = (*COMMON, QUERIES, KEYS, *QKV_BIASES)
QWEN3 = (*COMMON, QUERIES, KEYS, *HEAD_NORMS, *ATTENTION_BIASES)

MIXTRAL = (*_BODY, *PRE_NORMS, QUERIES, KEYS, *experts("block_sparse_moe", ("w1", "w3", "w2")))
QWEN3_MOE = (
    *(replace(tensor, mixture=False) if tensor in MLP else tensor for tensor in QWEN3),
    *experts(),
)

GPT_OSS = (
    *_BODY,
    *PRE_NORMS,
    QUERIES,
    KEYS,
    *ATTENTION_BIASES,
    Tensor(f"model.layers.{{}}.{SINKS}", ("heads",)),
    *experts(router="router", biases=True),
)

_JOINED = {
    "q_proj": ("qkv_proj", "attn_qkv", ()),
    "k_proj": ("qkv_proj", "attn_qkv", ("queries",)),
    "v_proj": ("qkv_proj", "attn_qkv", ("queries", "keys")),
    "gate_proj": ("gate_up_proj", "ffn_up", ()),
    "up_proj": ("gate_up_proj", "ffn_up", ("inner",)),
}


def _joined(tensor: Tensor) -> Tensor:
    """Store queries, keys and values as one tensor, and gate and up as another."""
    part = tensor.name.split(".")[-2]
    if part not in _JOINED:
        return tensor
    whole, gguf, after = _JOINED[part]
    hf = tensor.name.replace(part, whole)
    return replace(tensor, hf=hf, gguf=f"blk.{{}}.{gguf}.weight", after=after)


PHI3 = tuple(map(_joined, (*COMMON, QUERIES, KEYS)))

OLMO2 = (
    *BODY,
    *POST_NORMS,
    QUERIES,
    KEYS,
    _layer("self_attn.q_norm.weight", ("queries",), "attn_q_norm.weight"),
    _layer("self_attn.k_norm.weight", ("keys",), "attn_k_norm.weight"),
    *ATTENTION_BIASES,
)


def _gemma(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Name the norm before the feed-forward part as Gemma does, and mark all norms for GGUF."""
    found = []
    for tensor in tensors:
        hf = tensor.hf
        if tensor.name == PRE_NORMS[1].name:
            hf = "model.layers.{}.pre_feedforward_layernorm.weight"
        offset = 1.0 if tensor.name.endswith("norm.weight") else 0.0
        found.append(replace(tensor, hf=hf, gguf_offset=offset))
    return tuple(found)


GEMMA2 = _gemma(*COMMON, *POST_NORMS, QUERIES, KEYS, *ATTENTION_BIASES)
GEMMA3 = _gemma(*COMMON, *POST_NORMS, QUERIES, KEYS, *HEAD_NORMS, *ATTENTION_BIASES)


def read_llama(config: dict[str, Any]) -> dict[str, Any]:
    """Return a Llama configuration as it is."""
    return config


def read_mistral(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of Mistral 7B v0.1."""
    # An absent sliding_window means 4096; only an explicit null turns the window off.
    return {"sliding_window": 4096, "num_key_value_heads": 8} | config


def read_phi3(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Phi-3's defaults, and call longrope by its name: old files have "su"."""
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type") == "su":
        config = config | {"rope_scaling": scaling | {"type": "longrope"}}
    return {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096} | config


def read_granite(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Granite's defaults."""
    return {"attention_multiplier": 1.0} | config


def read_olmo2(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in OLMo 2's defaults."""
    return {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048} | config


def read_gemma2(config: dict[str, Any]) -> dict[str, Any]:
    """Translate the fields of Gemma 2, with its soft caps and a window in every other layer."""
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return _read_gemma(caps | {"sliding_window_pattern": 2} | config)


def read_gemma3(config: dict[str, Any]) -> dict[str, Any]:
    """Translate the fields of Gemma 3's text models, whose windows have a rotation of their own."""
    ropes = config.get("rope_parameters") or {}
    full, sliding = (ropes.get(kind) or {"rope_type": "default"} for kind in (FULL, SLIDING))
    # The older spelling has a scaling for layers that read the whole text, and both thetas.
    full = {"rope_theta": config.get("rope_theta", 1e6)} | full | (config.get("rope_scaling") or {})
    sliding = {"rope_theta": config.get("rope_local_base_freq", 1e4)} | sliding
    own = {"rope_scaling": None, "rope_parameters": {FULL: full, SLIDING: sliding}}
    defaults = {"sliding_window_pattern": 6, "max_position_embeddings": 131072}
    return _read_gemma(defaults | config | own)


def _read_gemma(config: dict[str, Any]) -> dict[str, Any]:
    if config.get("use_bidirectional_attention"):
        raise EasySpecError("use_bidirectional_attention is not supported")
    layers, pattern = config["num_hidden_layers"], config["sliding_window_pattern"]
    # Every `pattern`-th layer reads the whole text.
    kinds = [SLIDING] * layers
    kinds[pattern - 1 :: pattern] = [FULL] * (layers // pattern)
    defaults = {"head_dim": 256, "tie_word_embeddings": True, "sliding_window": 4096}
    own = {
        "hidden_act": config.get("hidden_activation") or "gelu_pytorch_tanh",
        "layer_types": config.get("layer_types") or kinds,
        "attention_multiplier": config.get("query_pre_attn_scalar", 256) ** -0.5,
        "embedding_multiplier": config["hidden_size"] ** 0.5,
        "norm_offset": 1.0,
    }
    return defaults | config | own


def read_qwen3(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Qwen3's defaults."""
    return read_qwen_window(config) | {"head_dim": config.get("head_dim") or 128}


def read_mixtral(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in Mixtral's defaults, and call its fields what Qwen's are called."""
    defaults = {"num_key_value_heads": 8, "num_experts_per_tok": 2, "rope_theta": 1e6}
    return (defaults | config) | {
        "num_experts": config.get("num_local_experts", 8),
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
    }


def read_qwen3_moe(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of Qwen3's mixtures of experts."""
    # transformers 5 writes num_local_experts; Qwen's own files say num_experts.
    count = config.get("num_experts") or config.get("num_local_experts") or 128
    defaults = {"num_key_value_heads": 4, "moe_intermediate_size": 768}
    # Unlike the dense models of the family, either all layers slide or none.
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return defaults | config | {"num_experts": count, "sliding_window": window}


def read_gpt_oss(config: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults of gpt-oss, and call its fields what Qwen's are called."""
    for name, only in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if config.get(name, only) != only:
            raise EasySpecError(f"{name}={config[name]} is not supported; only {only}")
    layers = config["num_hidden_layers"]
    rope = {
        "rope_type": "yarn",
        "factor": 32.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    }
    defaults = {
        "attention_bias": True,
        "head_dim": 64,
        "num_key_value_heads": 8,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "sliding_window": 128,
    }
    own = {
        "hidden_act": "clamped_swiglu",
        "layer_types": config.get("layer_types") or ([SLIDING, FULL] * layers)[:layers],
        "rope_parameters": config.get("rope_parameters") or rope,
        "num_experts": config.get("num_local_experts") or config.get("num_experts") or 128,
        "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True,
    }
    return defaults | config | own


def read_qwen_window(config: dict[str, Any]) -> dict[str, Any]:
    """List which layers slide: none without `use_sliding_window`."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        full = config.get("max_window_layers", 28) if window else config["num_hidden_layers"]
        types = [SLIDING if i >= full else FULL for i in range(config["num_hidden_layers"])]
    return config | {"sliding_window": window, "layer_types": types}


FAMILIES: dict[str, Family] = {
    "gemma2": Family(
        "Gemma 2",
        GEMMA2,
        read_gemma2,
        "Gemma2ForCausalLM",
        gguf="gemma2",
        fields=("attention_bias", "attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "gemma3_text": Family(
        "Gemma 3, text (270M, 1B)",
        GEMMA3,
        read_gemma3,
        "Gemma3ForCausalLM",
        gguf="gemma3",
        fields=("attention_bias", "attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "gpt_oss": Family(
        "gpt-oss",
        GPT_OSS,
        read_gpt_oss,
        "GptOssForCausalLM",
        fields=("attention_bias",),
        stacks_experts=True,
    ),
    "granite": Family(
        "Granite 3, dense",
        LLAMA,
        read_granite,
        "GraniteForCausalLM",
        gguf="granite",
        fields=(
            "attention_bias",
            "mlp_bias",
            "attention_multiplier",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_scaling",
        ),
    ),
    "llama": Family(
        "Llama 2, 3, 3.1, 3.2, 3.3; TinyLlama; SmolLM2",
        LLAMA,
        read_llama,
        "LlamaForCausalLM",
        gguf="llama",
        fields=("attention_bias", "mlp_bias"),
    ),
    # GGUF files of Mistral models say that their architecture is llama.
    "mistral": Family("Mistral, Nemo", MISTRAL, read_mistral, "MistralForCausalLM"),
    "mixtral": Family("Mixtral", MIXTRAL, read_mixtral, "MixtralForCausalLM"),
    "olmo2": Family(
        "OLMo 2", OLMO2, read_olmo2, "Olmo2ForCausalLM", gguf="olmo2", fields=("attention_bias",)
    ),
    "phi3": Family("Phi-3, Phi-3.5, Phi-4", PHI3, read_phi3, "Phi3ForCausalLM", gguf="phi3"),
    "qwen2": Family(
        "Qwen2, Qwen2.5, Qwen2-Math, Qwen2.5-Coder",
        QWEN2,
        read_qwen_window,
        "Qwen2ForCausalLM",
        gguf="qwen2",
    ),
    "qwen3": Family(
        "Qwen3, dense",
        QWEN3,
        read_qwen3,
        "Qwen3ForCausalLM",
        gguf="qwen3",
        fields=("attention_bias",),
    ),
    "qwen3_moe": Family(
        "Qwen3, mixtures of experts",
        QWEN3_MOE,
        read_qwen3_moe,
        "Qwen3MoeForCausalLM",
        fields=("attention_bias",),
    ),
}
"""Every supported `model_type`."""
