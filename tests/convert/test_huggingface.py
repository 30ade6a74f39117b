"""Hugging Face directories give bit-equal tensors, and a failed conversion gives nothing."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from convert.gguf_tokenizer import build_tokenizer
from convert.huggingface import open_huggingface
from convert.shards import HUGGING_FACE
from convert.stream import convert, verify
from easyspec_jax.checkpoint.config import read_model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.families import HEAD
from easyspec_jax.checkpoint.tensors import Slices
from easyspec_jax.errors import EasySpecError
from easyspec_jax.tokenizer import load_tokenizer


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a model to a directory named `hf`."""

    def save(model: PreTrainedModel, max_shard_size: str = "40KB") -> Path:
        model.save_pretrained(tmp_path / "hf", max_shard_size=max_shard_size)
        return tmp_path / "hf"

    return save


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(("max_shard_size", "several"), [("40KB", True), ("1GB", False)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_tensors_are_bit_equal(tiny_model, save, tmp_path, family, max_shard_size, several, dtype):
    model = tiny_model(family).to(getattr(torch, dtype))
    source = save(model, max_shard_size)
    assert (len(list(source.glob("*.safetensors"))) > 1) == several
    result = convert(open_huggingface(source), tmp_path / "out")
    assert (result.dtype, result.parameters) == (dtype, model.num_parameters())
    assert result.size == sum(values.nbytes for values in model.state_dict().values())
    assert_same(tmp_path / "out", model, dtype)
    assert read_model_config(tmp_path / "out") == read_model_config(source)


@pytest.mark.parametrize(
    ("stored", "written"),
    [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")],
)
def test_dtype_casts_and_is_recorded(tiny_model, save, tmp_path, stored, written):
    model = tiny_model().to(getattr(torch, stored))
    convert(open_huggingface(save(model)), tmp_path / "out", written)
    assert_same(tmp_path / "out", model.to(getattr(torch, written)), written)
    assert read_model_config(tmp_path / "out").dtype == written


def test_old_spelling_of_dtype_gives_way(tiny_model, save, tmp_path):
    source = save(tiny_model())
    edit(source / "config.json", lambda config: config | {"torch_dtype": config.pop("dtype")})
    convert(open_huggingface(source), tmp_path / "out", "bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "torch_dtype" not in config


def test_duplicate_of_a_tied_head_is_left_out(tiny_model, save, tmp_path):
    source = save(tiny_model(tie_word_embeddings=True), "1GB")
    shard = source / "model.safetensors"
    tensors = load_file(shard)
    save_file(tensors | {HEAD: tensors["model.embed_tokens.weight"].clone()}, shard)
    convert(open_huggingface(source), tmp_path / "out")
    assert HEAD not in open_checkpoint(tmp_path / "out").source.shapes()


def test_a_head_that_differs_from_the_embedding_is_kept(tiny_model, save, tmp_path):
    """Fine-tunes that train the head leave their configuration tied."""
    source = save(tiny_model(tie_word_embeddings=False), "1GB")
    edit(
        source / "config.json",
        lambda config: config | {"tie_word_embeddings": True, "transformers_weights": None},
    )
    convert(open_huggingface(source), tmp_path / "out", verify=True)
    opened = open_checkpoint(tmp_path / "out")
    np.testing.assert_array_equal(
        opened.source.read(HEAD), load_file(source / "model.safetensors")[HEAD]
    )
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    convert(open_huggingface(tmp_path / "out"), tmp_path / "back", format=HUGGING_FACE, verify=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "back").state_dict()
    assert all(
        torch.equal(theirs[name], values)
        for name, values in load_file(source / "model.safetensors").items()
    )


def test_a_copy_without_its_head_is_not_verified(tiny_model, save, tmp_path):
    """Older versions of this package converted such models so."""
    source = save(tiny_model(tie_word_embeddings=False), "1GB")
    edit(source / "config.json", lambda config: config | {"tie_word_embeddings": True})
    headless = tmp_path / "headless"
    shutil.copytree(source, headless)
    tensors = load_file(headless / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if name != HEAD},
        headless / "model.safetensors",
    )
    convert(open_huggingface(headless), tmp_path / "out")
    with pytest.raises(EasySpecError, match="tie_word_embeddings is True, but False in"):
        verify(open_huggingface(source), tmp_path / "out")


def test_a_tokenizer_that_cannot_be_opened_is_told_before_anything_is_written(
    tiny_model, save, tmp_path
):
    source = save(tiny_model())
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(EasySpecError, match="has no usable tokenizer"):
        open_huggingface(source)


def test_files_that_a_configuration_names_are_not_named_again(tiny_model, save, tmp_path):
    source = save(tiny_model(), "1GB")
    (source / "model.safetensors").rename(source / "other.safetensors")
    edit(
        source / "config.json",
        lambda config: config | {"transformers_weights": "other.safetensors"},
    )
    convert(open_huggingface(source), tmp_path / "out", format=HUGGING_FACE)
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert open_checkpoint(tmp_path / "out").source.shapes()


def test_named_chat_templates_come_along(tiny_model, save, tmp_path, tokenizer_metadata):
    source = save(tiny_model())
    build_tokenizer(tokenizer_metadata, "tiny").save_pretrained(source)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    convert(open_huggingface(source), tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template["tool_use"] == "tools"


def test_tokenizer_template_and_stop_ids_come_along(tiny_model, save, tmp_path, tokenizer_metadata):
    source = save(tiny_model())
    tokenizer = build_tokenizer(tokenizer_metadata, "tiny")
    tokenizer.save_pretrained(source)
    GenerationConfig(eos_token_id=[3, 5]).save_pretrained(source)
    (source / "pytorch_model.bin").write_bytes(b"stays behind")
    convert(open_huggingface(source), tmp_path / "out")
    opened = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened("hello <|end|>").input_ids == tokenizer("hello <|end|>").input_ids
    assert opened.chat_template == tokenizer.chat_template
    assert read_model_config(tmp_path / "out").stop_ids == (3, 5)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "weights",
    }


def test_values_beyond_the_dtype_are_refused_by_name(tiny_model, save, tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    source = save(model)
    with pytest.raises(
        EasySpecError,
        match=r"layers\.1\.mlp\.up_proj\.weight has values that overflow float16",
    ):
        convert(open_huggingface(source), tmp_path / "out", "float16")
    assert remaining(tmp_path) == ["hf"]
    convert(open_huggingface(source), tmp_path / "out", "bfloat16")


@pytest.mark.parametrize("failure", [MemoryError, EasySpecError])
def test_failed_conversion_leaves_nothing(tiny_model, save, tmp_path, failure):
    model = open_huggingface(save(tiny_model()))
    broken = replace(model, source=Interrupted(model.source, failure))
    with pytest.raises(failure):
        convert(broken, tmp_path / "out")
    assert remaining(tmp_path) == ["hf"]


def test_interrupted_conversion_goes_on(tiny_model, save, tmp_path):
    model = open_huggingface(save(tiny_model()))
    broken = replace(model, source=Interrupted(model.source, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(broken, tmp_path / "out")
    assert remaining(tmp_path) == [".out.partial", "hf"]
    assert convert(model, tmp_path / "out").reused > 0
    assert remaining(tmp_path) == ["hf", "out"]
    assert_same(tmp_path / "out", tiny_model(), "float32")


def test_existing_directory_is_kept(tiny_model, save, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").touch()
    with pytest.raises(EasySpecError, match="already exists"):
        convert(open_huggingface(save(tiny_model())), out)
    assert remaining(out) == ["mine"]


def test_missing_shard_is_refused(tiny_model, save):
    source = save(tiny_model())
    shard = min(source.glob("*.safetensors"))
    shard.unlink()
    with pytest.raises(EasySpecError, match=f"{shard.name} is missing"):
        open_huggingface(source)


def test_truncated_shard_is_refused(tiny_model, save):
    source = save(tiny_model())
    shard = max(source.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(EasySpecError, match=f"{shard.name} is truncated or damaged"):
        open_huggingface(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ is missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ is unknown"),
        ({"intermediate_size": 128}, r"has shape \(64, 96\) instead of \(64, 128\)"),
    ],
)
def test_contradictory_configuration_is_refused(tiny_model, save, change, message):
    source = save(tiny_model())
    edit(source / "config.json", lambda config: config | change)
    with pytest.raises(EasySpecError, match=message):
        open_huggingface(source)


def test_types_numpy_lacks_are_refused_by_name(tiny_model, save, tmp_path):
    source = save(tiny_model(), "1GB")
    shard = source / "model.safetensors"
    tensors = load_file(shard)
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, shard)
    with pytest.raises(EasySpecError, match=f"{name} is stored as F8_E4M3, which is not supported"):
        open_huggingface(source)
    assert remaining(tmp_path) == ["hf"]


def test_other_stored_types_need_a_dtype(tiny_model, save, tmp_path):
    source = save(tiny_model().to(torch.float64))
    with pytest.raises(EasySpecError, match="stored as float64"):
        convert(open_huggingface(source), tmp_path / "out")
    convert(open_huggingface(source), tmp_path / "out", "float32")


class Interrupted:
    """A source that fails at its fourth tensor."""

    def __init__(self, source, interruption) -> None:
        self._source, self._interruption, self._left = source, interruption, 3

    def shapes(self):
        return self._source.shapes()

    def dtypes(self):
        return self._source.dtypes()

    def read(self, name: str, window: Slices = ()) -> np.ndarray:
        self._left -= 1
        if self._left < 0:
            raise self._interruption
        return self._source.read(name, window)


def assert_same(directory: Path, model: PreTrainedModel, dtype: str) -> None:
    source = open_checkpoint(directory).source
    expected = model.state_dict()
    assert set(source.shapes()) == set(expected)
    for name, values in expected.items():
        read = source.read(name)
        assert read.dtype == np.dtype(dtype), name
        bits = (
            values.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            if dtype == "bfloat16"
            else values.numpy()
        )
        np.testing.assert_array_equal(read, bits, err_msg=name)


def edit(path: Path, change: Callable[[dict], dict]) -> None:
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def remaining(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_a_changed_configuration_is_not_verified(tiny_model, save, tmp_path):
    source = save(tiny_model())
    convert(open_huggingface(source), tmp_path / "out")
    verify(open_huggingface(source), tmp_path / "out")
    edit(tmp_path / "out" / "config.json", lambda config: config | {"rms_norm_eps": 0.5})
    with pytest.raises(
        EasySpecError, match=r"rms_norm_eps is 0\.5, but 1e-06 in .*; convert again"
    ):
        verify(open_huggingface(source), tmp_path / "out")


def test_an_output_within_its_source_goes_on_as_well(tiny_model, save):
    """So does one next to whatever else appears in the source's directory."""
    source = save(tiny_model())
    model = open_huggingface(source)
    broken = replace(model, source=Interrupted(model.source, KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        convert(broken, source / "out")
    (source / "log.txt").write_text("interrupted")
    assert convert(open_huggingface(source), source / "out").reused > 0
    assert_same(source / "out", tiny_model(), "float32")
