"""Definition of a family, and the tensors that several of them have."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

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
            >>> from easyspec_jax.checkpoint.families import FAMILIES
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
            >>> from easyspec_jax.checkpoint.families import FAMILIES
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


def layer(name: str, shape: tuple[str, ...], gguf: str) -> Tensor:
    """Return a tensor of every layer, by its names within one."""
    return Tensor(f"model.layers.{{}}.{name}", shape, f"blk.{{}}.{gguf}")


QUERIES = layer("self_attn.q_proj.weight", ("queries", "hidden"), "attn_q.weight")
KEYS = layer("self_attn.k_proj.weight", ("keys", "hidden"), "attn_k.weight")

PRE_NORMS = (
    layer("input_layernorm.weight", ("hidden",), "attn_norm.weight"),
    # Llama's name, although it is the norm before the feed-forward part.
    layer("post_attention_layernorm.weight", ("hidden",), "ffn_norm.weight"),
)

POST_NORMS = (
    replace(
        layer("self_attn.output_norm.weight", ("hidden",), "post_attention_norm.weight"),
        hf="model.layers.{}.post_attention_layernorm.weight",
    ),
    replace(
        layer("mlp.output_norm.weight", ("hidden",), "post_ffw_norm.weight"),
        hf="model.layers.{}.post_feedforward_layernorm.weight",
    ),
)

SHARED = (
    Tensor(EMBEDDING, ("vocab", "hidden"), "token_embd.weight"),
    Tensor(FINAL_NORM, ("hidden",), "output_norm.weight"),
    layer("self_attn.v_proj.weight", ("keys", "hidden"), "attn_v.weight"),
    layer("self_attn.o_proj.weight", ("hidden", "queries"), "attn_output.weight"),
    Tensor(HEAD, ("vocab", "hidden"), "output.weight"),
)
"""Tensors of every family. Queries and keys are missing, because GGUF stores them in two ways."""

MLP = (
    layer("mlp.gate_proj.weight", ("inner", "hidden"), "ffn_gate.weight"),
    layer("mlp.up_proj.weight", ("inner", "hidden"), "ffn_up.weight"),
    layer("mlp.down_proj.weight", ("hidden", "inner"), "ffn_down.weight"),
)
"""One feed-forward part."""

BODY = (*SHARED, *MLP)
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
    layer("self_attn.q_proj.bias", ("queries",), "attn_q.bias"),
    layer("self_attn.k_proj.bias", ("keys",), "attn_k.bias"),
    layer("self_attn.v_proj.bias", ("keys",), "attn_v.bias"),
)

HEAD_NORMS = (
    layer("self_attn.q_norm.weight", ("head_dim",), "attn_q_norm.weight"),
    layer("self_attn.k_norm.weight", ("head_dim",), "attn_k_norm.weight"),
)


def when(tensors: tuple[Tensor, ...], flag: str) -> tuple[Tensor, ...]:
    """Return tensors that models have if a flag of their configuration says so."""
    return tuple(replace(tensor, when=flag) for tensor in tensors)


ATTENTION_BIASES = when(
    (*QKV_BIASES, layer("self_attn.o_proj.bias", ("hidden",), "attn_output.bias")),
    "attention_bias",
)
MLP_BIASES = when(
    (
        layer("mlp.gate_proj.bias", ("inner",), "ffn_gate.bias"),
        layer("mlp.up_proj.bias", ("inner",), "ffn_up.bias"),
        layer("mlp.down_proj.bias", ("hidden",), "ffn_down.bias"),
    ),
    "mlp_bias",
)
