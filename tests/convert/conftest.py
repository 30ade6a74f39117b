"""Tiny models to convert: as Hugging Face directories and as GGUF files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ t", "1 2", "12 3", "Ġ 1"]
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5
ADDED = {
    "<|bos|>": CONTROL,
    "<|end|>": CONTROL,
    "<|eot|>": CONTROL,
    "<tool>": USER_DEFINED,
    "[PAD]": UNUSED,
}
TOKENS = [
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
    *ADDED,
]
KINDS = [1] * (len(TOKENS) - len(ADDED)) + list(ADDED.values())
TEMPLATE = "{% for message in messages %}<|bos|>{{ message['content'] }}<|end|>{% endfor %}"
HEADS, KEY_HEADS = 4, 2

TOKENIZER: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": KINDS,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": TOKENS.index("<|bos|>"),
    "tokenizer.ggml.eos_token_id": TOKENS.index("<|end|>"),
    "tokenizer.chat_template": TEMPLATE,
}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a directory that pip takes for its only index."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


@pytest.fixture
def tokenizer_metadata() -> dict[str, Any]:
    """Provide the metadata of a tiny GGUF file's tokenizer."""
    return dict(TOKENIZER)


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Makes a random two-layer model, biases included, of any family."""
    import torch  # here, because most tests of conversion run without it

    def make(family: str = "llama", **fields: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        sizes: dict[str, Any] = {
            "vocab_size": len(TOKENS),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KEY_HEADS,
            "max_position_embeddings": 128,
        }
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | fields))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        return model

    return make


@pytest.fixture
def write_gguf(tmp_path: Path) -> Callable[..., Path]:
    """Write a model as llama.cpp's converter does.

    Matrices are stored as `stored`, vectors in float32. Metadata and tensors that are given replace
    those of the same name; None leaves one out, and a tuple is bytes with their type.
    """

    def write(
        model: PreTrainedModel,
        stored: Type = Type.F32,
        metadata: Mapping[str, Any] | None = None,
        tensors: Mapping[str, np.ndarray | tuple[np.ndarray, Type] | None] | None = None,
    ) -> Path:
        family = model.config.model_type.removesuffix("_text")
        path = tmp_path / f"{family}-{stored.name}.gguf"
        pre: dict[str, Any] = {
            "tokenizer.ggml.pre": "qwen2" if family.startswith("qwen") else "gpt-2"
        }
        writer = gguf.GGUFWriter(path, family)
        for key, value in (model_metadata(model) | TOKENIZER | pre | dict(metadata or {})).items():
            if value is not None:
                writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
        for name, values in (gguf_tensors(model) | dict(tensors or {})).items():
            if isinstance(values, tuple):
                writer.add_tensor(name, values[0], raw_dtype=values[1])
            elif values is not None and values.dtype == np.int8:
                writer.add_tensor(name, values)
            elif values is not None:
                kind = stored if values.ndim == 2 else Type.F32
                writer.add_tensor(
                    name, gguf.quants.quantize(np.ascontiguousarray(values), kind), raw_dtype=kind
                )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


def model_metadata(model: PreTrainedModel) -> dict[str, Any]:
    config = model.config
    rope, family = config.rope_parameters, config.model_type.removesuffix("_text")
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope.get("full_attention", rope)["rope_theta"],
    }
    if family.startswith("gemma"):
        values["attention.key_length"] = config.head_dim
        values["attention.sliding_window"] = config.sliding_window
    own = {
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "attention.scale": "attention_multiplier",
        "logit_scale": "logits_scaling",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
    for key, field in own.items():
        if (value := getattr(config, field, None)) is not None:
            values[key] = float(value)
    return {f"{family}.{key}": value for key, value in values.items()}


def gguf_tensors(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """Rename tensors by the gguf package's table, and permute rows as llama.cpp does."""
    family = model.config.model_type.removesuffix("_text")
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, family.upper()), 2)
    heads = {"q_proj": HEADS, "k_proj": KEY_HEADS} if family in ("llama", "granite") else {}
    tensors = {}
    for name, parameter in model.state_dict().items():
        values, projection = parameter.float().numpy(), name.split(".")[-2]
        if projection in heads:
            values = permute(values, heads[projection])
        if family.startswith("gemma") and name.endswith("norm.weight"):
            values = values + np.float32(1)
        if name != "lm_head.weight" or not model.config.tie_word_embeddings:
            tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    return tensors


def permute(weights: np.ndarray, heads: int) -> np.ndarray:
    """Permute rows as LlamaModel.permute in llama.cpp's convert_hf_to_gguf.py does."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return halves.swapaxes(1, 2).reshape(weights.shape)
