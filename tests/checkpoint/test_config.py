"""ModelConfig reads `config.json` as transformers does, and refuses unsupported fields by name."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from easyspec_jax.checkpoint.config import (
    ModelConfig,
    RopeScaling,
    model_config,
    read_json,
    read_model_config,
)
from easyspec_jax.checkpoint.families import FAMILIES
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
CASES.remove(("mistral", "no key-value heads"))  # a null, which transformers refuses


@pytest.mark.parametrize(("family", "spelling"), CASES)
def test_agrees_with_transformers(family, spelling, tmp_path):
    config = {"model_type": family, "sliding_window": None} | SIZES | SPELLINGS[spelling]
    if family.startswith("qwen"):
        config |= {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path) == as_transformers_reads(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_on_what_transformers_writes(family, tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}
    sizes = SIZES | {"torch_dtype": None, "dtype": "bfloat16", "sliding_window": None}
    written = AutoConfig.for_model(family, rope_parameters=rope, **sizes)
    written.save_pretrained(tmp_path)
    ours = read_model_config(tmp_path)
    assert ours == as_transformers_reads(tmp_path)
    assert (ours.rope_scaling, ours.dtype) == (RopeScaling(**LLAMA3), "bfloat16")


def as_transformers_reads(directory: Path) -> ModelConfig:
    config = AutoConfig.from_pretrained(directory)
    config.standardize_rope_params()  # as its RoPE does before it reads them
    rope = config.rope_parameters
    eos = config.eos_token_id
    return ModelConfig(
        model_type=config.model_type,
        num_hidden_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        vocab_size=config.vocab_size,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_scaling=RopeScaling(**{name: rope[name] for name in LLAMA3})
        if rope["rope_type"] == "llama3"
        else None,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=config.tie_word_embeddings,
        qkv_bias=config.model_type == "qwen2",
        qk_norm=config.model_type == "qwen3",
        stop_ids=tuple(eos) if isinstance(eos, list) else (eos,),
        dtype=str(config.dtype).removeprefix("torch."),
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
        ({"sliding_window": 511}, "sliding-window attention is not supported"),
        ({"model_type": "mistral", "sliding_window": 511}, "sliding-window"),
        # A window of 4096 by default.
        ({"model_type": "mistral", "max_position_embeddings": 4097}, "sliding-window"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 2,
            },
            "sliding-w",
        ),
        (
            {"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]},
            "sliding-window",
        ),
        ({"num_local_experts": 8}, "mixture-of-experts"),
        (
            {"model_type": "mixtral"},
            "mixture-of-experts models .model_type 'mixtral'. are not supported",
        ),
        ({"model_type": "qwen2_moe"}, "mixture-of-experts"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "RoPE scaling 'yarn' is not supported",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            "RoPE scaling 'linear' is not supported",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
            "RoPE scaling 'dynamic' is not supported",
        ),
        (
            {"model_type": "mamba"},
            "model_type 'mamba' is not supported; supported: llama, mistral, qwen2, qwen3",
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
