"""GGUF files give the tensors, configuration and tokenizer of the model they were made from."""

import itertools
import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from convert.gguf import _attention_scalar, open_gguf
from convert.models import Model
from convert.stream import convert
from easyspec_jax.checkpoint.canonical import unpermute
from easyspec_jax.checkpoint.config import model_config, read_model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.families import EMBEDDING
from easyspec_jax.checkpoint.rope import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)
from easyspec_jax.errors import EasySpecError
from easyspec_jax.tokenizer import load_tokenizer
from tests.convert.conftest import gguf_tensors, model_metadata


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf) -> Model:
    return open_gguf(smollm2_gguf)


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_has_the_tensors_transformers_reads(smollm2_gguf, smollm2):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**smollm2.config))
    theirs = load_gguf_checkpoint(smollm2_gguf, return_tensors=True, model_to_load=model)["tensors"]
    assert smollm2.source.shapes().keys() == theirs.keys()
    for name, values in theirs.items():
        # Names and row orders are computed independently, but both use the gguf library for
        # blocks, hence no tolerance.
        np.testing.assert_array_equal(smollm2.source.read(name), values.numpy(), err_msg=name)


@pytest.mark.slow
@pytest.mark.real
def test_smollm2_has_the_tokenizer_transformers_builds(smollm2_gguf, smollm2, tmp_path):
    smollm2.write_companions(tmp_path)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name)
    # transformers ignores the pre-tokenizer `smollm`, with which llama.cpp splits at every \p{N},
    # as SmolLM2's own tokenizer.json does. Merges join a space with the first byte of an Arabic
    # digit, so that " ٣" would get other ids.
    theirs.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(False)]
    )
    for text in (
        "Hello world",
        " leading and trailing ",
        "a\n\n\nb\t\tc  d",
        "don't WE'LL I'd",
        "def f(x):\n    return x**2",
        "日本語のテキスト",
        "中文 测试。",
        "안녕하세요",
        "Привет, мир!",
        "مرحبا ٣٤",
        "😀👍🏽 emoji",
        "café naïve ﬁ",
        "1234567890",
        "3.14 and 2,718",
        "x²+y½=Ⅷ",
        "１２３ 4a5b6",
        "{'a': [1, 2], \"b\": null}",
        "https://a.bc/d?e=f&g",
        "<|im_start|>user\nhi<|im_end|>\n",
        "<|endoftext|><|im_start|><| im_end |>",
        "\r\n \u00a0\u3000\u200b",
    ):
        assert ours(text).input_ids == theirs(text).input_ids, text
        assert ours.decode(ours(text).input_ids) == text
    assert ours.chat_template == theirs.chat_template
    chat = ours.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
    stops = json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"]
    assert stops == [ours.eos_token_id, ours.convert_tokens_to_ids("<|endoftext|>")]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("stored", "tolerance"),
    # Relative to the largest magnitude of a block.
    [
        (Type.F32, 0.0),
        (Type.F16, 2**-11),  # bits of the mantissa
        (Type.BF16, 2**-8),
        (Type.Q8_0, 0.5 / 127 + 2**-11),  # half a step, and the rounding of the scale
        (Type.Q4_0, 1 / 8 + 2**-11),  # has no value above 7/8
        (Type.Q4_1, 1 / 15 + 2**-10),
    ],
    ids=["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"],
)
def test_tensors_are_those_of_the_original(tiny_model, write_gguf, family, stored, tolerance):
    model = tiny_model(family)
    source = open_gguf(write_gguf(model, stored)).source
    expected = {name: values.numpy() for name, values in model.state_dict().items()}
    assert source.shapes() == {name: values.shape for name, values in expected.items()}
    for name, values in expected.items():
        error = np.abs(source.read(name) - values).max()
        assert error <= tolerance * np.abs(values).max(), name


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_converted_model_equals_the_original(tiny_model, write_gguf, tmp_path, family, tied):
    fields = {"tie_word_embeddings": tied, "rms_norm_eps": 1e-5}
    rope = {"rope_type": "default", "rope_theta": 5e5}
    model = tiny_model(family, **fields, rope_parameters=rope)
    result = convert(open_gguf(write_gguf(model)), tmp_path / "out")
    opened = open_checkpoint(tmp_path / "out")
    parameters = dict(model.named_parameters())  # a tied head appears once
    assert set(opened.source.shapes()) == set(parameters)
    for name, values in parameters.items():
        np.testing.assert_array_equal(
            opened.source.read(name), values.detach().numpy(), err_msg=name
        )
    assert result.parameters == model.num_parameters()
    eos = AutoTokenizer.from_pretrained(tmp_path / "out").eos_token_id
    expected = model.config.to_dict() | {"dtype": "float32", "eos_token_id": eos}
    assert opened.config == model_config(expected)


def test_super_blocks_of_four_bits_are_those_of_ggml(tiny_model, write_gguf):
    """Dequantize as dequantize_row_q4_K of ggml-quants.c does, in its order of loops."""
    rows, random = 3, np.random.default_rng(0)
    blocks = random.integers(0, 256, (rows, 144), np.uint8)
    blocks[:, :4] = random.uniform(0.01, 1, (rows, 2)).astype(np.float16).view(np.uint8)
    expected = np.zeros((rows, 256), np.float32)
    for block, out in zip(blocks, expected, strict=True):
        (d, least), scales, quants = (
            block[:4].view(np.float16).astype(np.float32),
            block[4:16],
            block[16:],
        )
        for j in range(8):
            if j < 4:
                scale, minimum = scales[j] & 63, scales[j + 4] & 63
            else:
                scale = (scales[j + 4] & 0xF) | ((scales[j - 4] >> 6) << 4)
                minimum = (scales[j + 4] >> 4) | ((scales[j] >> 6) << 4)
            nibbles = quants[j // 2 * 32 : j // 2 * 32 + 32] >> (4 * (j % 2)) & 0xF
            out[j * 32 : j * 32 + 32] = d * scale * nibbles - least * minimum
    check_embedding(tiny_model, write_gguf, (blocks, Type.Q4_K), expected)


def test_super_blocks_of_six_bits_are_those_of_ggml(tiny_model, write_gguf):
    """Dequantize as dequantize_row_q6_K of ggml-quants.c does."""
    rows, random = 3, np.random.default_rng(1)
    blocks = random.integers(0, 256, (rows, 210), np.uint8)
    blocks[:, 208:] = random.uniform(0.01, 1, (rows, 1)).astype(np.float16).view(np.uint8)
    expected = np.zeros((rows, 256), np.float32)
    for block, out in zip(blocks, expected, strict=True):
        d, scales = block[208:].view(np.float16).astype(np.float32)[0], block[192:208].view(np.int8)
        for half in range(2):
            low, high = (
                block[64 * half : 64 * half + 64].astype(int),
                block[128 + 32 * half :][:32].astype(int),
            )
            for part in range(4):
                nibbles = low[32 * (part % 2) :][:32] >> (4 * (part // 2)) & 0xF
                quants = (nibbles | ((high >> (2 * part) & 3) << 4)) - 32
                scale = scales[8 * half + 2 * part :][:2].repeat(16)
                out[128 * half + 32 * part :][:32] = d * scale * quants
    check_embedding(tiny_model, write_gguf, (blocks, Type.Q6_K), expected)


def check_embedding(tiny_model, write_gguf, stored, expected):
    model = tiny_model(
        hidden_size=256, intermediate_size=32, vocab_size=len(expected), tie_word_embeddings=True
    )
    model_ = open_gguf(write_gguf(model, tensors={"token_embd.weight": stored}))
    assert model_.dtype == "bfloat16"
    read = model_.source.read(EMBEDDING)
    np.testing.assert_allclose(read, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(
        model_.source.read(EMBEDDING, (slice(1, 2), slice(5, 90))), read[1:2, 5:90]
    )


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_windows_of_permuted_rows_are_those_of_the_whole(tiny_model, write_gguf, family):
    source = open_gguf(write_gguf(tiny_model(family))).source
    for name in (
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
    ):
        whole = source.read(name)
        for start, stop in itertools.combinations(range(0, len(whole) + 1, 5), 2):
            np.testing.assert_array_equal(
                source.read(name, (slice(start, stop),)), whole[start:stop]
            )


def test_a_file_without_a_tokenizer_converts(tiny_model, write_gguf, tokenizer_metadata, tmp_path):
    model = open_gguf(write_gguf(tiny_model(), metadata=dict.fromkeys(tokenizer_metadata)))
    assert not model.has_tokenizer
    convert(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "generation_config.json",
        "weights",
    ]


def test_unpermute_undoes_llama_cpp():
    rows = np.arange(2 * 8 * 3).reshape(16, 3)
    for values in (rows, rows[:, 0]):
        halves = values.reshape(2, 2, 4, *values.shape[1:])
        permuted = halves.swapaxes(1, 2).reshape(values.shape)
        assert not np.array_equal(permuted, values)
        np.testing.assert_array_equal(unpermute(permuted, head_dim=8), values)


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (Type.F32, "float32"),
        (Type.F16, "float16"),
        (Type.BF16, "bfloat16"),
        (Type.Q8_0, "bfloat16"),
    ],
    ids=["F32", "F16", "BF16", "Q8_0"],
)
def test_default_dtype_is_the_stored_one(tiny_model, write_gguf, stored, dtype):
    assert open_gguf(write_gguf(tiny_model(), stored)).dtype == dtype


def test_every_stop_id_of_the_metadata_is_kept(
    tiny_model, write_gguf, tokenizer_metadata, tmp_path
):
    eos, eot = (
        tokenizer_metadata["tokenizer.ggml.tokens"].index(token) for token in ("<|end|>", "<|eot|>")
    )
    metadata = {"tokenizer.ggml.eot_token_id": eot, "tokenizer.ggml.eom_token_id": eos}
    convert(open_gguf(write_gguf(tiny_model(), metadata=metadata)), tmp_path / "out")
    assert read_model_config(tmp_path / "out").stop_ids == (eos, eot)


def test_an_end_of_turn_stops_without_an_end_of_text(
    tiny_model, write_gguf, tokenizer_metadata, tmp_path
):
    metadata = {
        "tokenizer.ggml.eos_token_id": None,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.chat_template": None,
    }
    convert(open_gguf(write_gguf(tiny_model(), metadata=metadata)), tmp_path / "out")
    named = tokenizer_metadata["tokenizer.ggml.tokens"].index("<|end|>")
    assert read_model_config(tmp_path / "out").stop_ids == (3, named)


def test_the_end_of_turn_that_the_template_writes_stops(
    tiny_model, write_gguf, tokenizer_metadata, tmp_path
):
    """Some fine-tunes' metadata still name the end-of-text token of their base model."""
    tokens = tokenizer_metadata["tokenizer.ggml.tokens"]
    metadata = {
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}<|eot|>\n{% endfor %}",
    }
    convert(open_gguf(write_gguf(tiny_model(), metadata=metadata)), tmp_path / "out")
    stop_ids = tuple(tokens.index(token) for token in ("<|end|>", "<|eot|>"))
    assert read_model_config(tmp_path / "out").stop_ids == stop_ids


def test_special_tokens_that_are_ends_by_their_names_stop(
    tiny_model, write_gguf, tokenizer_metadata, tmp_path
):
    """Qwen's files name the end of a turn only, and llama.cpp stops at the end of a text, too."""
    tokens = [*tokenizer_metadata["tokenizer.ggml.tokens"], "<|endoftext|>", "<|im_end|>"]
    metadata = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*tokenizer_metadata["tokenizer.ggml.token_type"], 3, 1],
        "tokenizer.ggml.eos_token_id": tokens.index("<|eot|>"),
        "tokenizer.chat_template": None,
    }
    model = tiny_model(vocab_size=len(tokens))
    convert(open_gguf(write_gguf(model, metadata=metadata)), tmp_path / "out")
    # The last one is an ordinary token: a text may contain it.
    stop_ids = tuple(tokens.index(token) for token in ("<|eot|>", "<|end|>", "<|endoftext|>"))
    assert read_model_config(tmp_path / "out").stop_ids == stop_ids


@pytest.mark.parametrize("value", [9999, -1, "x", [1, 2]])
@pytest.mark.parametrize("key", ["eot_token_id", "eos_token_id"])
def test_a_role_that_no_token_has_is_refused(tiny_model, write_gguf, key, value):
    metadata = {f"tokenizer.ggml.{key}": value}
    with pytest.raises(EasySpecError, match=rf"{key} is damaged \('.*'\); fetch"):
        open_gguf(write_gguf(tiny_model(), metadata=metadata))


def write_parts(model, directory: Path, tokenizer: dict) -> list[Path]:
    """Write a model as llama.cpp's tools split it, a few tensors to a file."""
    writer = gguf.GGUFWriter(directory / "model.gguf", "llama", split_max_tensors=5)
    for key, value in (model_metadata(model) | tokenizer).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    for name, values in gguf_tensors(model).items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(directory.glob("model-*-of-*.gguf"))


def test_parts_are_one_model(tiny_model, write_gguf, tokenizer_metadata, tmp_path):
    model = tiny_model()
    parts = write_parts(model, tmp_path, tokenizer_metadata)
    assert len(parts) > 2
    whole = open_gguf(write_gguf(model))
    for part in parts:
        opened = open_gguf(part)
        assert opened.files == tuple(parts)
        assert opened.config == whole.config
        for name in whole.source.shapes():
            np.testing.assert_array_equal(opened.source.read(name), whole.source.read(name))
    convert(open_gguf(parts[0]), tmp_path / "out", verify=True)
    assert load_tokenizer(tmp_path / "out")("hello").input_ids


def test_parts_that_are_not_of_one_model_are_refused(tiny_model, tokenizer_metadata, tmp_path):
    first, second, *others = write_parts(tiny_model(), tmp_path, tokenizer_metadata)
    renamed = second.rename(tmp_path / "second.gguf")
    with pytest.raises(EasySpecError, match=r"00002-of-0000\d\.gguf is missing"):
        open_gguf(first)
    with pytest.raises(
        EasySpecError, match=r"second\.gguf is one of \d parts; name them like model-00001-of-"
    ):
        open_gguf(renamed)
    second.write_bytes(others[0].read_bytes())
    with pytest.raises(
        EasySpecError, match=r"00002-of-0000\d\.gguf is not part 2 of \d as its name says"
    ):
        open_gguf(first)


def renumbered(path: Path, directory: Path, **fields: int) -> Path:
    """Copy a part with other numbers in its metadata; fields keep their size."""
    reader = gguf.GGUFReader(path, "r")
    content = bytearray(path.read_bytes())
    for name, value in fields.items():
        field = reader.fields[f"split.{name}"]
        start = field.offset + sum(part.nbytes for part in field.parts[:-1])
        content[start : start + field.parts[-1].nbytes] = value.to_bytes(
            field.parts[-1].nbytes, "little"
        )
    (directory / path.name).write_bytes(content)
    return directory / path.name


def test_parts_whose_tensors_do_not_add_up_are_refused(tiny_model, tokenizer_metadata, tmp_path):
    first, second, *others = write_parts(tiny_model(), tmp_path, tokenizer_metadata)
    for path in (second, *others):
        (tmp_path / "fewer").mkdir(exist_ok=True)
        (tmp_path / "fewer" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(EasySpecError, match=r"its parts hold \d+ of 999 tensors"):
        open_gguf(renumbered(first, tmp_path / "fewer", **{"tensors.count": 999}))
    twice = tmp_path / "twice"
    twice.mkdir()
    for path in (first, *others):
        (twice / path.name).write_bytes(path.read_bytes())
    again = renumbered(others[0], tmp_path / "fewer", no=1)
    (twice / second.name).write_bytes(again.read_bytes())
    with pytest.raises(
        EasySpecError, match="which an earlier part holds too; fetch all parts again"
    ):
        open_gguf(first.parent / "twice" / first.name)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered(tiny_model, write_gguf, factor):
    scaling = Llama3Scaling(factor, 1.0, 4.0, 8192)
    factors = llama3_factors(scaling, head_dim=16, theta=5e5)
    model = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    path = write_gguf(model, tensors={"rope_freqs.weight": factors})
    assert rope_of(path).scaling == scaling


def rope_of(path: Path) -> Rope:
    """Return the rotation of a file's layers."""
    return model_config(open_gguf(path).config).layers[0].rope


@pytest.mark.parametrize(
    ("metadata", "scaling"),
    [
        ({"factor": 4.0}, LinearScaling(4.0)),
        ({"type": "linear", "factor": 4.0, "original_context_length": 64}, LinearScaling(4.0)),
        (
            {"type": "yarn", "factor": 4.0, "original_context_length": 64, "finetuned": True},
            YarnScaling(4.0, 64, 32.0, 1.0, True, 0.1 * np.log(4) + 1),
        ),
        (
            {"type": "yarn", "factor": 2.0, "yarn_beta_fast": 16.0, "yarn_beta_slow": 2.0},
            YarnScaling(2.0, 128, 16.0, 2.0, True, 0.1 * np.log(2) + 1),
        ),
    ],
)
def test_rope_scaling_is_read(tiny_model, write_gguf, metadata, scaling):
    metadata = {f"llama.rope.scaling.{key}": value for key, value in metadata.items()}
    path = write_gguf(tiny_model(max_position_embeddings=128), metadata=metadata)
    assert rope_of(path).scaling == scaling
    path = write_gguf(tiny_model(), metadata={"llama.rope.scale_linear": 2.0})
    assert rope_of(path).scaling == LinearScaling(2.0)


def test_longrope_is_read_from_its_tensors(tiny_model, write_gguf):
    factors = {"short": [1.0] * 8, "long": [2.5] * 8}
    tensors = {f"rope_factors_{k}.weight": np.array(v, np.float32) for k, v in factors.items()}
    metadata = {
        "llama.rope.scaling.original_context_length": 64,
        "llama.rope.scaling.attn_factor": 1.5,
    }
    path = write_gguf(tiny_model(), metadata=metadata, tensors=tensors)
    expected = LongRopeScaling(tuple(factors["short"]), tuple(factors["long"]), 64, 1.5)
    assert rope_of(path).scaling == expected


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_windows_are_read(tiny_model, write_gguf, family):
    """A Llama with windows is a Mistral, since transformers would ignore a Llama's."""
    metadata = {f"{family}.attention.sliding_window": 9}
    config = open_gguf(write_gguf(tiny_model(family), metadata=metadata)).config
    assert config["model_type"] == {"llama": "mistral", "qwen2": "qwen2"}[family]
    assert {kind.window for kind in model_config(config).layers} == {9}


def test_rope_over_a_part_of_each_head_is_read(tiny_model, write_gguf):
    path = write_gguf(tiny_model("qwen2"), metadata={"qwen2.rope.dimension_count": 8})
    assert rope_of(path).dim == 8


def test_other_rope_factors_are_refused(tiny_model, write_gguf):
    factors = llama3_factors(Llama3Scaling(8.0, 1.0, 2.0, 8192), head_dim=16, theta=5e5)
    model = tiny_model(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    two, none, zero = factors.reshape(2, -1), factors[:0], factors * (np.arange(8) > 0)
    for wrong in (factors, factors[:-1], two, none, zero.astype(np.float32)):
        with pytest.raises(EasySpecError, match=r"rope_freqs\.weight"):
            open_gguf(write_gguf(model, tensors={"rope_freqs.weight": wrong}))


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"general.architecture": "mamba"},
            "architecture 'mamba' is not supported; supported: ",
        ),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.attn_factor": 2.0},
            r"llama\.rope\.scaling\.attn_factor is not supported",
        ),
        (
            {"llama.rope.scaling.yarn_log_multiplier": 0.1},
            r"llama\.rope\.scaling\.yarn_log_multiplier is not supported",
        ),
        (
            {"llama.rope.scaling.type": "su", "llama.rope.scaling.factor": 2.0},
            "RoPE scaling 'su' is not supported",
        ),
        ({"llama.rope.dimension_count": 8}, "8 of 16 dimensions"),
        ({"llama.rope.dimension_count": "x"}, "dimension_count is damaged \\('x'\\)"),
        ({"llama.block_count": None}, r"llama\.block_count is missing"),
        (
            {"llama.attention.head_count_kv": [2, 1]},
            "num_key_value_heads=.2, 1. has the wrong type",
        ),
        ({"split.count": 3}, "one of 3 parts"),
        ({"split.count": "x"}, "split.count=x"),
        ({"tokenizer.ggml.model": ["gpt2"]}, "tokenizer model"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer model 'bert'"),
    ],
)
def test_unsupported_metadata_is_refused_by_name(tiny_model, write_gguf, metadata, message):
    with pytest.raises(EasySpecError, match=message):
        open_gguf(write_gguf(tiny_model(), metadata=metadata))


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "none"},
        {"llama.rope.scaling.factor": 1.0},
        {"llama.expert_count": 0},
    ],
)
def test_metadata_without_effect_is_accepted(tiny_model, write_gguf, metadata):
    assert rope_of(write_gguf(tiny_model(), metadata=metadata)).scaling is None


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.attn_q.weight": None}, r"blk\.1\.attn_q\.weight is missing"),
        ({"token_embd.weight": None}, r"token_embd\.weight is missing"),
        (
            {"blk.0.attn_rot.weight": np.zeros((2, 2), np.float32)},
            r"blk\.0\.attn_rot\.weight is unknown",
        ),
        ({"blk.0.attn_q.bias": np.zeros(64, np.float32)}, r"attn_q\.bias is unknown"),
        (
            {"blk.0.ffn_up.weight": np.zeros((2, 64), np.float32)},
            r"ffn_up\.weight has shape \(2, 64\)",
        ),
    ],
)
def test_other_tensors_are_refused_by_name(tiny_model, write_gguf, tmp_path, tensors, message):
    with pytest.raises(EasySpecError, match=message):
        convert(open_gguf(write_gguf(tiny_model(), tensors=tensors)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_integer_tensors_are_refused_by_name(tiny_model, write_gguf, tmp_path):
    path = write_gguf(tiny_model(), tensors={"blk.1.ffn_up.weight": np.zeros((96, 64), np.int8)})
    with pytest.raises(
        EasySpecError, match=r"blk\.1\.ffn_up\.weight is stored as I8, which is not supported"
    ):
        convert(open_gguf(path), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama-F32.gguf"]


@pytest.mark.parametrize("kept", [0.999, 0.7, 0.05, 0.01, 0.001])
def test_truncated_file_is_refused(tiny_model, write_gguf, kept):
    path = write_gguf(tiny_model())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(EasySpecError, match="truncated or damaged"):
        open_gguf(path)


def test_damaged_length_is_refused(tiny_model, write_gguf):
    path = write_gguf(tiny_model())
    data, key = bytearray(path.read_bytes()), b"tokenizer.ggml.token_type"
    length = data.index(key) + len(key) + 8  # behind the types of the value and of its elements
    data[length : length + 8] = (2**21).to_bytes(8, "little")
    path.write_bytes(data + bytes((length - len(data)) % 4))  # the file ends with a whole element
    with pytest.raises(EasySpecError, match="ends too early"):
        open_gguf(path)


def test_another_byte_order_is_refused(tmp_path):
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(EasySpecError, match="byte order"):
        open_gguf(path)


@pytest.mark.parametrize("content", [b"", b"GG", b"PK\x03\x04 something else", b"\x00" * 100])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(EasySpecError, match="not a GGUF file"):
        open_gguf(path)


def test_missing_file_and_directory_are_refused(tmp_path):
    with pytest.raises(EasySpecError, match="is missing"):
        open_gguf(Path(tmp_path / "absent.gguf"))
    with pytest.raises(EasySpecError, match="cannot be read"):
        open_gguf(tmp_path)


def llama3_factors(scaling: Llama3Scaling, head_dim: int, theta: float) -> np.ndarray:
    """Compute the factors as LlamaModel.generate_extra_tensors in convert_hf_to_gguf.py does."""
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (index / head_dim)
        if wavelength < scaling.original / scaling.high_freq_factor:
            factors.append(1.0)
        elif wavelength > scaling.original / scaling.low_freq_factor:
            factors.append(scaling.factor)
        else:
            smooth = scaling.original / wavelength - scaling.low_freq_factor
            smooth /= scaling.high_freq_factor - scaling.low_freq_factor
            factors.append(1 / ((1 - smooth) / scaling.factor + smooth))
    return np.array(factors, np.float32)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tiny_model, write_gguf):
    path = write_gguf(tiny_model("llama"), Type.F32)
    source = open_gguf(path).source
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(
        EasySpecError, match=r"\.gguf cannot be read \(it ends too early\); fetch it again"
    ):
        for name in source.shapes():
            source.read(name)


@pytest.mark.parametrize(
    ("layers", "width", "heads", "head_dim", "expected"),
    [(26, 2304, 8, 256, 256), (46, 4608, 32, 128, 144), (46, 4608, "32", 128, 128)],
)
def test_scores_of_gemma_are_divided_as_in_llama_cpp(layers, width, heads, head_dim, expected):
    config = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "head_dim": head_dim,
    }
    assert _attention_scalar(config, layers=46) == expected
