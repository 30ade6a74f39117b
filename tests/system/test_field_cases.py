"""Faults found in the field, made small. Tests elsewhere cover the kind that each belongs to."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM

from easyspec_jax.generate import main
from easyspec_jax.tokenizer import load_tokenizer
from easyspec_jax.tokenizer.stream import TextStream, decode_text
from tests.support.models import save_model

WORDS = [
    "hello world how are you doing the quick brown fox def main return 12345 if else while for\n"
] * 20


def generated(directory: Path, prompt: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    command = [
        "--target",
        str(directory),
        "--method",
        "vanilla",
        "--json",
        "--max-new-tokens",
        "10",
    ]
    assert main([*command, "--prompt", prompt]) == 0
    return json.loads(capsys.readouterr().out)


def as_transformers_decodes(directory: Path, ids: list[int]) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt = torch.tensor([ids])
    found = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=10,
        do_sample=False,
        pad_token_id=0,
    )
    return found[0, len(ids) :].tolist()


def test_a_tied_configuration_beside_a_head_of_its_own(tmp_path, capsys):
    """Case 2: the stored head was dropped."""
    save_model(tmp_path, "llama3", tie_word_embeddings=False, eos_token_id=None)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    found = generated(tmp_path, "hello", capsys)
    assert found["token_ids"] == as_transformers_decodes(tmp_path, found["prompt_ids"])


def sentencepiece() -> tuple[Tokenizer, dict[str, Any]]:
    """Make a tokenizer like CodeQwen1.5's: sentencepiece BPE with the model type of Qwen2."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "<|endoftext|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    raw.train_from_iterator(WORDS, trainer)
    data = json.loads(raw.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    raw = Tokenizer.from_str(json.dumps(data))
    steps = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    raw.decoder = decoders.Sequence(steps)
    return raw, {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}


def distilled() -> tuple[Tokenizer, dict[str, Any]]:
    """Qwen2's splits, and a BOS that only the configuration asks for: DeepSeek-R1-Distill-Qwen."""
    raw = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\p{N}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    raw.decoder, raw.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(WORDS, trainer)
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "legacy": True,
    }
    return raw, config | {"bos_token": "<bos>", "eos_token": "<eos>"}


@pytest.mark.parametrize("make", [sentencepiece, distilled])
def test_a_tokenizer_of_another_kind_than_the_model_type(tmp_path, capsys, make):
    """Case 3: ids and text were those of Qwen2's own class, and BOS was missing."""
    raw, config = make()
    save_model(tmp_path, "qwen2", eos_token_id=None)
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = generated(tmp_path, "hello world 12345", capsys)
    bos = [raw.token_to_id("<bos>")] if "add_bos_token" in config else []
    assert found["prompt_ids"] == [*bos, *raw.encode("hello world 12345").ids]
    whole, prompt = (raw.decode(found["prompt_ids"] + ids) for ids in (found["token_ids"], []))
    assert found["text"] == whole.removeprefix(prompt)
    assert found["token_ids"] == as_transformers_decodes(tmp_path, found["prompt_ids"])


def test_messages_with_fields_that_are_no_strings(tmp_path):
    """Case 4: a stack trace, and a job that could never be finished."""
    model = tmp_path / "model"
    save_model(model, "llama3")
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    answer = {"role": "assistant", "content": "yo"}
    lines = [
        {"id": "good", "prompt": "hello"},
        {"id": "weight", "messages": [answer | {"weight": 0}]},
        {"id": "null", "messages": [answer | {"refusal": None, "tool_calls": None}]},
    ]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files = ["--prompts", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert (
        main(["--target", str(model), "--method", "vanilla", "--max-new-tokens", "2", *files]) == 0
    )
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [record["id"] for record in found] == ["good", "weight", "null"]


def test_a_special_token_inside_of_a_sentencepiece_text(tmp_path):
    """Case 5: the text depended on how many tokens a round delivered."""
    raw, config = sentencepiece()
    raw.add_special_tokens(["<|im_end|>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    opened = load_tokenizer(tmp_path)
    hello, world = (raw.encode(text, add_special_tokens=False).ids for text in ("hello", "world"))
    (end,) = raw.encode("<|im_end|>", add_special_tokens=False).ids
    for rounds in (
        [[*hello, end, *world]],
        [hello, [end], world],
        [[*hello, end], world],
        [hello, [end, *world]],
    ):
        stream = TextStream(opened)
        said = "".join(stream.push(ids) for ids in rounds) + stream.rest()
        assert said == stream.text == decode_text(opened, [*hello, end, *world]) == "hello world"
    stream = TextStream(opened, prompt_ids=hello)
    assert stream.push(world) + stream.rest() == " world"


def test_one_file_beside_a_stale_index(tmp_path, capsys):
    """Case 7: refused as incomplete, where transformers loads the file."""
    save_model(tmp_path, "llama3", seed=0, eos_token_id=None).save_pretrained(
        tmp_path, max_shard_size="40KB"
    )
    save_model(tmp_path, "llama3", seed=1, eos_token_id=None)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    found = generated(tmp_path, "hi", capsys)
    assert found["token_ids"] == as_transformers_decodes(tmp_path, found["prompt_ids"])
