"""A converted model is exported as a Hugging Face directory bit for bit, or not at all."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from convert.gguf import open_gguf
from convert.huggingface import open_huggingface
from convert.shards import HUGGING_FACE
from convert.stream import convert
from easyspec_jax.checkpoint.config import read_model_config
from easyspec_jax.checkpoint.families import EMBEDDING, HEAD
from easyspec_jax.checkpoint.orbax import WEIGHTS
from easyspec_jax.checkpoint.safetensors import SAFETENSORS
from easyspec_jax.errors import EasySpecError
from tests.support.models import FAMILIES, byte_tokenizer, save_model

IDS = torch.arange(4, 68).reshape(2, 32)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gpt_oss"}))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_round_trip_keeps_every_bit(tmp_path, family, dtype):
    save_model(tmp_path / "hf", family).to(getattr(torch, dtype)).save_pretrained(tmp_path / "hf")
    model = load(tmp_path / "hf")
    convert(open_huggingface(tmp_path / "hf"), tmp_path / "orbax")
    result = convert(open_huggingface(tmp_path / "orbax"), tmp_path / "out", format=HUGGING_FACE)
    assert (result.dtype, result.parameters) == (dtype, model.num_parameters())
    assert_loads_as(tmp_path / "out", model, load_file(tmp_path / "hf" / SAFETENSORS))
    assert read_config(tmp_path / "out") == read_config(tmp_path / "hf")
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("cat").input_ids
        == byte_tokenizer()("cat").input_ids
    )


def test_a_family_that_stacks_experts_is_not_written_as_hugging_face_files(tmp_path):
    save_model(tmp_path / "hf", "gpt_oss", num_hidden_layers=1)
    with pytest.raises(EasySpecError, match="model_type 'gpt_oss' cannot be written as Hugging"):
        convert(open_huggingface(tmp_path / "hf"), tmp_path / "out", format=HUGGING_FACE)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
THETA = {"rope_type": "default", "rope_theta": 5e5}
OWN_FIELDS: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"rope_parameters": {"full_attention": THETA}},
    "llama": {"attention_bias": True, "mlp_bias": True},
    "granite": {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.25,
        "attention_multiplier": 0.125,
        "logits_scaling": 8.0,
    },
}


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        *itertools.product(["llama", "qwen2", "qwen3", "phi3", "olmo2", "granite"], [False, True]),
        ("gemma2", True),  # llama.cpp has no name for a head of its own
        ("gemma3_text", True),
    ],
)
def test_model_out_of_a_gguf_file_loads_in_transformers(
    tiny_model, write_gguf, tmp_path, family, tied
):
    own = {"rope_parameters": THETA} | OWN_FIELDS.get(family, {})
    own |= {"tie_word_embeddings": tied, "pad_token_id": 0}
    padding = {"tokenizer.ggml.padding_token_id": 0}  # Phi-3's own is not in a tiny vocabulary
    model = tiny_model(family, rms_norm_eps=1e-5, **own)
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "norm" in name:  # such that 1 + values, which Gemma's files have, loses no bit
                values.mul_(1024).round_().div_(1024)
    convert(open_gguf(write_gguf(model, metadata=padding)), tmp_path / "orbax")
    convert(open_huggingface(tmp_path / "orbax"), tmp_path / "out", format=HUGGING_FACE)
    assert_loads_as(tmp_path / "out", model)


def test_shards_of_a_hugging_face_directory_become_one_file(tiny_model, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    convert(open_huggingface(tmp_path / "hf"), tmp_path / "out", format=HUGGING_FACE)
    assert_loads_as(tmp_path / "out", model)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_file_is_marked_for_transformers_and_has_no_tied_head(tmp_path):
    save_model(tmp_path / "hf", "smollm2")
    convert(open_huggingface(tmp_path / "hf"), tmp_path / "out", format=HUGGING_FACE)
    with safe_open(tmp_path / "out" / SAFETENSORS, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert EMBEDDING in file.keys()  # noqa: SIM118
        assert HEAD not in file.keys()  # noqa: SIM118


def test_dtype_casts_and_is_recorded(tmp_path):
    save_model(tmp_path / "hf", "qwen2")
    convert(open_huggingface(tmp_path / "hf"), tmp_path / "orbax")
    convert(open_huggingface(tmp_path / "orbax"), tmp_path / "out", "bfloat16", HUGGING_FACE)
    assert_loads_as(tmp_path / "out", load(tmp_path / "hf", dtype=torch.bfloat16))


def test_every_field_and_every_stop_id_comes_back(tmp_path):
    save_model(tmp_path / "hf", "llama3")
    GenerationConfig(eos_token_id=[2, 5]).save_pretrained(tmp_path / "hf")
    config = read_config(tmp_path / "hf") | {
        "pretraining_tp": 1,
        "of_ours": {"ünknown": [1e-05, None]},
    }
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    convert(open_huggingface(tmp_path / "hf"), tmp_path / "orbax", "float16")
    convert(open_huggingface(tmp_path / "orbax"), tmp_path / "out", format=HUGGING_FACE)
    assert read_config(tmp_path / "out") == config | {"dtype": "float16"}
    assert read_model_config(tmp_path / "out").stop_ids == (2, 5)


@pytest.mark.parametrize("failure", [MemoryError, EasySpecError])
def test_failed_export_leaves_nothing(tmp_path, failure):
    class Failing:
        def shapes(self):
            return model.source.shapes()

        def dtypes(self):
            return model.source.dtypes()

        def read(self, name, window=()):
            raise failure

    save_model(tmp_path / "hf", "qwen2")
    model = open_huggingface(tmp_path / "hf")
    with pytest.raises(failure):
        convert(replace(model, source=Failing()), tmp_path / "out", format=HUGGING_FACE)
    assert remaining(tmp_path) == ["hf"]


def test_damaged_checkpoint_leaves_nothing(tmp_path):
    save_model(tmp_path / "hf", "llama3")
    convert(open_huggingface(tmp_path / "hf"), tmp_path / "orbax")
    model = open_huggingface(tmp_path / "orbax")
    for path in (tmp_path / "orbax" / WEIGHTS).glob("**/d/*"):
        path.write_bytes(bytes(byte ^ 255 for byte in path.read_bytes()))
    with pytest.raises(EasySpecError, match="is not a readable Orbax checkpoint"):
        convert(model, tmp_path / "out", format=HUGGING_FACE)
    assert remaining(tmp_path) == ["hf", "orbax"]


def assert_loads_as(
    directory: Path, model: Any, written: dict[str, torch.Tensor] | None = None
) -> None:
    """transformers finds exactly the tensors of the model, and computes the same with them.

    written: its tensors as they are stored, if some are joined in memory.
    """
    loaded, report = load(directory, output_loading_info=True)
    assert not any(report.values()), report
    assert loaded.dtype == model.dtype
    stored = load_file(directory / SAFETENSORS)
    if written is None:
        written = dict(model.named_parameters())
    assert stored.keys() == written.keys()  # a tied head appears in neither
    for name, values in written.items():
        assert stored[name].dtype == values.dtype
        assert torch.equal(stored[name], values), name
    for name, values in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), values), name
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def load(directory: Path, **options: Any) -> Any:
    # In half precision torch's grouped products refuse experts as narrow as those of tests.
    return AutoModelForCausalLM.from_pretrained(
        directory, experts_implementation="eager", **options
    )


def read_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


def remaining(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
