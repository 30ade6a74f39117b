"""ModelConfig reads `config.json` as transformers does, and refuses unsupported fields by name."""

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from easyspec_jax.checkpoint.config import (
    Activation,
    MixtureConfig,
    ModelConfig,
    model_config,
    read_json,
    read_model_config,
)
from easyspec_jax.checkpoint.families import FAMILIES, QKNorm
from easyspec_jax.checkpoint.layer_kinds import LayerKind
from easyspec_jax.checkpoint.rope import Llama3Scaling, Rope, RopeScaling, YarnScaling
from easyspec_jax.errors import EasySpecError

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

SIZES = {
    "num_hidden_layers": 3,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 7,
    "torch_dtype": "bfloat16",
}

SPELLINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no key-value heads": {"num_key_value_heads": None},
    "head size of its own": {"head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "several stop ids": {"eos_token_id": [7, 9, 11]},
    "new name of dtype": {"dtype": "float16", "torch_dtype": None},
    "rope as in transformers 4": {"rope_theta": 5e5, "rope_scaling": None},
    "llama3 as in transformers 4": {
        "rope_theta": 5e5,
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
    "llama3, older still": {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
    "rope as in transformers 5": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "llama3 as in transformers 5": {
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    },
    "linear by 1": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 1.0}},
    "yarn by 1": {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 1}},
    "dynamic by 1": {"rope_theta": 5e5, "rope_scaling": {"type": "dynamic", "factor": 1.0}},
    "llama3 with its length outside": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            **{k: v for k, v in LLAMA3.items() if not k.startswith("original")},
        },
        "original_max_position_embeddings": 256,
    },
    "biases": {"attention_bias": True, "mlp_bias": True},
    "another activation": {"hidden_act": "gelu_pytorch_tanh"},
    "a window that hides nothing": {
        "sliding_window": 512,
        "use_sliding_window": True,
        "max_window_layers": 0,
    },
    "both, at odds": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {"rope_type": "llama3", **LLAMA3},
    },
}


CASES = [(family, spelling) for family in FAMILIES for spelling in SPELLINGS]
for refused in (  # by transformers
    ("mistral", "no key-value heads"),
    ("mixtral", "no key-value heads"),
    ("qwen3_moe", "no key-value heads"),
    ("gemma2", "no key-value heads"),
    ("gemma3_text", "no key-value heads"),
    ("gpt_oss", "no key-value heads"),
    ("gemma3_text", "both, at odds"),
    *(("phi3", spelling) for spelling in SPELLINGS if "llama3" in spelling or "by 1" in spelling),
    ("phi3", "both, at odds"),
):
    CASES.remove(refused)

OWN = ("granite", "gemma2", "gemma3_text")
"""Families with multipliers and caps."""

SLIDING = ("gemma2", "gemma3_text", "gpt_oss")
"""Families in which some layers have a window by default."""

NORMS: dict[str, QKNorm] = {
    "qwen3": "head",
    "qwen3_moe": "head",
    "gemma3_text": "head",
    "olmo2": "full",
}
"""Norms of queries and keys, in families that have them."""

BIASES = {
    "attention_bias": (
        *("llama", "qwen3", "qwen3_moe", "granite", "olmo2", "gemma2", "gemma3_text"),
        "gpt_oss",
    ),
    "mlp_bias": ("llama", "granite"),
}
"""Families that read these fields; others have a bias always or never."""


@pytest.mark.parametrize(("family", "spelling"), CASES)
def test_agrees_with_transformers(family, spelling, tmp_path):
    config = {"model_type": family, "sliding_window": None} | SIZES | SPELLINGS[spelling]
    if family in SLIDING:
        config["layer_types"] = ["full_attention"] * SIZES["num_hidden_layers"]
    if family.startswith("qwen"):
        config |= {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path) == as_transformers_reads(tmp_path)


MULTIPLIERS = {
    "embedding_multiplier": 12,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.0078125,
    "logits_scaling": 16.0,
}


GEMMA = {
    "attn_logit_softcapping": 20.0,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": 64,
    "sliding_window": 8,
}


@pytest.mark.parametrize(
    ("family", "own"),
    [("granite", MULTIPLIERS), ("gemma2", GEMMA), ("gemma3_text", GEMMA), ("gemma3_text", {})],
)
def test_agrees_on_fields_of_some_families(family, own, tmp_path):
    config = {"model_type": family} | SIZES | own
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path) == as_transformers_reads(tmp_path)
    # In other families they mean nothing.
    plain = {"model_type": "qwen2"} | SIZES
    assert model_config(plain | own) == model_config(plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_on_what_transformers_writes(family, tmp_path):
    rope: dict[str, Any] = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    sizes = SIZES | {"torch_dtype": None, "dtype": "bfloat16", "sliding_window": None}
    if family == "phi3":
        rope = {"rope_type": "default", "rope_theta": 5e5}
    if family in SLIDING:
        sizes["layer_types"] = ["full_attention"] * SIZES["num_hidden_layers"]
    if family == "gemma3_text":
        rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default"}}
    written = AutoConfig.for_model(family, rope_parameters=rope, **sizes)
    written.save_pretrained(tmp_path)
    ours = read_model_config(tmp_path)
    assert ours == as_transformers_reads(tmp_path)
    expected = None if family == "phi3" else Llama3Scaling(*LLAMA3.values())
    assert ours.layers[0].rope.scaling == expected
    assert ours.dtype == "bfloat16"


def as_transformers_reads(directory: Path) -> ModelConfig:
    config = AutoConfig.from_pretrained(directory)
    config.standardize_rope_params()  # as its RoPE does before it reads them
    eos, kind = config.eos_token_id, config.model_type
    own = partial(getattr, config) if kind in OWN else lambda _, other: other
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    is_gemma = kind.startswith("gemma")
    scale = config.query_pre_attn_scalar**-0.5 if is_gemma else own("attention_multiplier", None)
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return ModelConfig(
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        layers=tuple(layer_kind(config, head_dim, name) for name in types),
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        hidden_act=activation_of(config),
        attention_bias=kind in BIASES["attention_bias"] and config.attention_bias,
        mlp_bias=kind in BIASES["mlp_bias"] and config.mlp_bias,
        attention_sinks=kind == "gpt_oss",
        qk_norm=NORMS.get(kind, "none"),
        pre_norm=kind != "olmo2",
        post_norm=kind in ("gemma2", "gemma3_text", "olmo2"),
        norm_offset=float(is_gemma),
        attention_multiplier=scale,
        # Gemma 3's attention does not read it, whatever its configuration says.
        attn_logit_softcapping=None
        if kind == "gemma3_text"
        else own("attn_logit_softcapping", None),
        final_logit_softcapping=own("final_logit_softcapping", None),
        embedding_multiplier=config.hidden_size**0.5
        if is_gemma
        else own("embedding_multiplier", 1.0),
        residual_multiplier=own("residual_multiplier", 1.0),
        logits_scaling=own("logits_scaling", 1.0),
        stop_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        dtype=str(config.dtype).removeprefix("torch."),
        mixture=mixture_as_transformers_reads(config),
    )


def activation_of(config: Any) -> Activation:
    if config.model_type == "gpt_oss":
        return "clamped_swiglu"
    return getattr(config, "hidden_activation", None) or config.hidden_act


def mixture_as_transformers_reads(config: Any) -> MixtureConfig | None:
    if not hasattr(config, "num_local_experts"):
        return None
    dense: tuple[int, ...] = ()
    if config.model_type == "qwen3_moe":
        step, layers = config.decoder_sparse_step, range(config.num_hidden_layers)
        dense = tuple(n for n in layers if n in config.mlp_only_layers or (n + 1) % step)
    return MixtureConfig(
        num_experts=config.num_local_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        moe_intermediate_size=getattr(config, "moe_intermediate_size", config.intermediate_size),
        norm_topk_prob=getattr(config, "norm_topk_prob", True),
        dense_layers=dense,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        {"norm_topk_prob": True, "mlp_only_layers": [0]},
        {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
        {"decoder_sparse_step": 2},
    ],
)
def test_mixtures_agree_with_transformers(fields, tmp_path):
    config = {"model_type": "qwen3_moe"} | SIZES | fields
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path) == as_transformers_reads(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_experts_per_tok": 9, "num_local_experts": 8}, "is more than the 8 experts"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok=0 must be at least 1"),
        ({"num_local_experts": 2**20}, "1048576 experts in 3 layers are more than"),
        ({"num_local_experts": "8"}, "num_local_experts='8' has the wrong type; expected int"),
    ],
)
def test_refuses_mixtures_that_cannot_be(fields, message):
    with pytest.raises(EasySpecError, match=message):
        model_config({"model_type": "mixtral"} | SIZES | fields)


def layer_kind(config: Any, head_dim: int, name: str) -> LayerKind:
    """Read how a type of layer rotates and how far back it reads."""
    rope = config.rope_parameters.get(name, config.rope_parameters)
    slides = name == "sliding_attention" and config.sliding_window < config.max_position_embeddings
    window = config.sliding_window if slides else None
    return LayerKind(Rope(rope["rope_theta"], head_dim, scaling_of(rope)), window)


def scaling_of(rope: Mapping[str, Any]) -> RopeScaling | None:
    if rope["rope_type"] == "llama3":
        return Llama3Scaling(*(rope[field] for field in LLAMA3))
    if rope["rope_type"] != "yarn" or rope["factor"] == 1:
        return None
    return YarnScaling(
        factor=rope["factor"],
        original=rope["original_max_position_embeddings"],
        beta_fast=rope["beta_fast"],
        beta_slow=rope["beta_slow"],
        truncate=rope["truncate"],
        attention_factor=0.1 * math.log(rope["factor"]) + 1,
    )


@pytest.mark.parametrize(
    ("family", "flags"),
    [
        ("qwen2", {"attention_bias": True}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}),
        (
            "qwen2",
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention"] * 3,
            },
        ),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}),
    ],
)
def test_flags_without_a_meaning_change_nothing(family, flags):
    plain = {"model_type": family} | SIZES
    assert model_config(plain | flags) == model_config(plain)
    layers = AutoConfig.for_model(family, **SIZES | flags).layer_types
    assert layers == ["full_attention"] * 3


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("granite", {"sliding_window": 8}),
        ("olmo2", {"sliding_window": 8, "layer_types": ["sliding_attention"] * 3}),
        ("gemma3_text", {"attn_logit_softcapping": 2.0}),
        ("gemma2", {"sliding_window_pattern": 3}),
        ("qwen3_moe", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 8}),
    ],
)
def test_fields_of_other_families_change_nothing(family, fields):
    """As in transformers, whose model of the family does not read them."""
    plain = {"model_type": family} | SIZES
    assert model_config(plain | fields) == model_config(plain)


@pytest.mark.parametrize("family", ["phi3", "mixtral"])
def test_all_layers_slide_whatever_their_types_say(family):
    fields = {"sliding_window": 8, "layer_types": ["full_attention"] * 3}
    layers = model_config({"model_type": family} | SIZES | fields).layers
    assert [kind.window for kind in layers] == [8, 8, 8]


def test_generation_config_decides_what_stops(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES))
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 2], "temperature": 0.6})
    )
    assert read_model_config(tmp_path).stop_ids == (1, 2)
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    assert read_model_config(tmp_path).stop_ids == (7,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sliding_window": 511}, "sliding_window=511 has no meaning for model_type 'llama'"),
        ({"model_type": "mistral", "sliding_window": -1}, "sliding_window=-1 must be at least 1"),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention"] * 2 + ["sliding_attention"]},
            "layer_types has 'sliding_attention' but sliding_window is not set",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["chunked_attention"] * 3},
            "layer_types has 'chunked_attention', which is not supported",
        ),
        (
            {"model_type": "qwen3", "layer_types": ["full_attention"] * 2},
            "layer_types has 2 entries for 3 layers",
        ),
        (
            {"num_local_experts": 8},
            "mixture-of-experts models of model_type 'llama' are not supported",
        ),
        ({"model_type": "qwen2_moe"}, "mixture-of-experts"),
        (
            {"hidden_act": "gelu"},
            "hidden_act='gelu' is not supported; supported: silu, gelu_pytorch_tanh",
        ),
        (
            {"model_type": "gemma2", "use_bidirectional_attention": True},
            "use_bidirectional_attention is not supported",
        ),
        (
            {"rope_scaling": {"rope_type": "mrope", "mrope_section": [2, 1, 1]}},
            "RoPE scaling 'mrope' is not supported; supported: default, linear, dynamic",
        ),
        ({"partial_rotary_factor": 0.4}, "partial_rotary_factor=0.4 would rotate 3 of 8"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 1e308}},
            "the frequencies of RoPE scaling 'dynamic' cannot be computed",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor must be a list of 4 numbers",
        ),
        (
            {"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            "the frequencies of RoPE scaling 'yarn' cannot be computed",
        ),
        (
            {
                "model_type": "mistral",
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "rope_parameters": {"full_attention": {"rope_type": "default"}},
            },
            "rope_parameters has nothing for layers of 'sliding_attention'",
        ),
        (
            {
                "model_type": "mistral",
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "rope_parameters": {
                    "full_attention": {"partial_rotary_factor": 0.5},
                    "sliding_attention": {},
                },
            },
            "layers that rotate different numbers of channels are not supported",
        ),
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not supported; supported: gemma2, gemma3_text, gpt_oss, "
            "granite, llama, mistral, mixtral, olmo2, phi3, qwen2, qwen3, qwen3_moe",
        ),
        ({"model_type": None}, "model_type 'None' is not supported"),
        ({"model_type": ["llama"]}, "is not supported"),
    ],
)
def test_refuses_by_name_what_would_give_other_text(change, message):
    with pytest.raises(EasySpecError, match=f"^config: .*{message}"):
        model_config({"model_type": "llama"} | SIZES | change)


@pytest.mark.parametrize(
    "field",
    [
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "vocab_size",
        "max_position_embeddings",
    ],
)
def test_names_a_missing_field(field):
    config = {"model_type": "llama"} | SIZES
    del config[field]
    with pytest.raises(EasySpecError, match=f"the field '{field}' is missing"):
        model_config(config)


@pytest.mark.parametrize("field", ["swiglu_limit", "swiglu_alpha"])
def test_refuses_other_clamps_of_gpt_oss(field):
    with pytest.raises(EasySpecError, match=f"config: {field}=5.0 is not supported; only"):
        model_config({"model_type": "gpt_oss"} | SIZES | {field: 5.0})


def test_names_a_missing_field_of_the_rope_scaling():
    scaling = {"rope_type": "llama3", **LLAMA3}
    del scaling["high_freq_factor"]
    with pytest.raises(EasySpecError, match="the field 'high_freq_factor' is missing"):
        model_config({"model_type": "llama"} | SIZES | {"rope_scaling": scaling})


def test_a_configuration_without_a_type_is_refused():
    with pytest.raises(EasySpecError, match=r"model_type '\(none\)' is not supported"):
        model_config(SIZES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_hidden_layers": "three"},
            "num_hidden_layers='three' has the wrong type; expected int",
        ),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5 has the wrong type"),
        ({"hidden_size": [48]}, "hidden_size"),
        ({"vocab_size": None}, "wrong type"),
        ({"num_key_value_heads": True}, "num_key_value_heads=True"),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings='false' has the wrong type; expected bool",
        ),
        ({"rms_norm_eps": "small"}, "wrong type"),
        ({"rope_scaling": "llama3"}, "rope_scaling='llama3' has the wrong type"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "factor='4'"),
        ({"rope_parameters": [1e6]}, "rope_parameters"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>' must be a token id"),
        ({"eos_token_id": [2, None]}, "must be a token id or a list of token ids"),
        ({"eos_token_id": 2.7}, "must be a token id or a list of token ids"),
        ({"eos_token_id": 2**40}, "must be a token id or a list of token ids"),
        ({"layer_types": 5}, "wrong type"),
        ({"rms_norm_eps": 10**400}, "wrong type"),
    ],
)
def test_names_a_field_of_the_wrong_type(change, message):
    with pytest.raises(EasySpecError, match=message):
        model_config({"model_type": "llama"} | SIZES | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be at least 1"),
        ({"vocab_size": -1}, "vocab_size=-1 must be at least 1"),
        ({"num_key_value_heads": 4}, "6 query heads do not divide into 4 key-value heads"),
        ({"head_dim": 7}, "head_dim=7 must be even"),
        ({"num_attention_heads": 10}, "hidden_size=48 does not divide into 10 heads"),
        (
            {"num_hidden_layers": 10**9},
            "num_hidden_layers=1000000000 must be at least 1 and below 10000",
        ),
        ({"vocab_size": 2**31}, "vocab_size=2147483648 must be"),
        (
            {"model_type": "granite", "logits_scaling": 0},
            "logits_scaling=0.0 must be positive",
        ),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05 must be positive"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be positive"),
        ({"rope_theta": -1.0}, "rope_theta=-1.0 must be positive"),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "factor": 0.0}},
            "factor=0.0 must be positive",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}},
            "low_freq_factor must be below",
        ),
    ],
)
def test_refuses_impossible_sizes(change, message):
    with pytest.raises(EasySpecError, match=message):
        model_config({"model_type": "llama"} | SIZES | change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "config.json is missing"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe\x00", "cannot be read as JSON"),
        (b"[1, 2]", "must hold a JSON object"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_unreadable_json_names_the_file(tmp_path, content, message):
    path = tmp_path / "config.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EasySpecError, match=message):
        read_json(path)


def test_a_mistral_without_a_number_of_key_heads_has_eight(tmp_path):
    config = (
        {"model_type": "mistral", "sliding_window": None}
        | SIZES
        | {"num_attention_heads": 16, "hidden_size": 64}
    )
    del config["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path) == as_transformers_reads(tmp_path)
    assert read_model_config(tmp_path).num_key_value_heads == 8
