"""A checkpoint directory means what transformers takes it to mean, however its files compete."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.families import EMBEDDING, HEAD
from easyspec_jax.checkpoint.safetensors import INDEX, SAFETENSORS
from easyspec_jax.errors import EasySpecError
from tests.support.models import family_config

Tensors = dict[str, torch.Tensor]

FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


def random_tensors(config: Any, seed: int) -> Tensors:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return {name: torch.randn_like(values) for name, values in model.state_dict().items()}


def write_sharded(
    directory: Path, tensors: Tensors, chance: random.Random, index: str = INDEX
) -> None:
    """Two to four files with an index; a tensor may be in two, or listed for the wrong one."""
    count = chance.randint(2, 4)
    files = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    placed = {name: chance.choice(files) for name in tensors}
    stored = {
        file: {name: tensors[name] for name in tensors if placed[name] == file} for file in files
    }
    if chance.random() < 0.4:
        name, file = chance.choice(sorted(tensors.keys() - {FREQUENCIES})), chance.choice(files)
        stored[file][name] = torch.randn_like(tensors[name])
    for file, held in stored.items():
        save_file(
            held or {EMBEDDING: tensors[EMBEDDING]}, directory / file, metadata={"format": "pt"}
        )
    if chance.random() < 0.3:
        placed[chance.choice(sorted(tensors))] = chance.choice(files)
    if chance.random() < 0.2:
        del placed[chance.choice(sorted(tensors))]
    (directory / index).write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def write_layout(directory: Path, chance: random.Random) -> None:
    """Write a tiny model in one of the layouts that real directories have."""
    tied = chance.random() < 0.5
    config = family_config(
        "llama3",
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=40,
        tie_word_embeddings=tied,
    )
    config.save_pretrained(directory)
    tensors = random_tensors(config, chance.randint(0, 999))
    if tied:
        kind = chance.choice(["none", "copy", "other", "narrow"])
        tensors.pop(HEAD)
        if kind == "narrow":
            tensors[EMBEDDING] = tensors[EMBEDDING].bfloat16()
        if kind != "none":
            other = torch.randn(40, 16) if kind == "other" else tensors[EMBEDDING].float().clone()
            tensors[HEAD] = other
    if chance.random() < 0.2:
        rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
        tensors[FREQUENCIES] = rotary.inv_freq.clone()
    if chance.random() < 0.1:
        tensors["model.layers.0.self_attn.unheard_of"] = torch.zeros(3)
    named = chance.random()
    if named < 0.4:
        save_file(tensors, directory / SAFETENSORS, metadata={"format": "pt"})
        if chance.random() < 0.5:  # saved in shards before
            write_sharded(directory, {name: values + 1 for name, values in tensors.items()}, chance)
            for shard in sorted(directory.glob("model-*"))[: chance.randint(0, 2)]:
                shard.unlink()
    elif named < 0.85:
        write_sharded(directory, tensors, chance)
        if chance.random() < 0.1:
            min(directory.glob("model-*")).unlink()
    else:
        name = chance.choice(["named.safetensors", "named.safetensors.index.json"])
        if name.endswith(".json"):
            write_sharded(directory, tensors, chance, name)
        else:
            save_file(tensors, directory / name, metadata={"format": "pt"})
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"transformers_weights": name}))
        if chance.random() < 0.5:
            save_file({"stale": torch.zeros(1)}, directory / SAFETENSORS)
    if chance.random() < 0.3:
        save_file(
            {"layers.0.attention.wq.weight": torch.zeros(3)}, directory / "consolidated.safetensors"
        )
    if chance.random() < 0.2:
        torch.save({EMBEDDING: torch.zeros(3)}, directory / "pytorch_model.bin")


def as_transformers_loads(directory: Path) -> Tensors:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not loaded[1]["missing_keys"], loaded[1]
    return loaded[0].state_dict()


@pytest.mark.parametrize("seed", range(8))
def test_tensors_are_those_that_transformers_loads(tmp_path, seed):
    """8 × 26 = 208 directories: the same tensors, or a refusal that says why."""
    chance, same = random.Random(seed), 0
    for number in range(26):
        directory = tmp_path / str(number)
        directory.mkdir()
        write_layout(directory, chance)
        try:
            opened = open_checkpoint(directory)
        except EasySpecError as error:
            # An unknown tensor, which transformers drops, or a missing file, on which it fails.
            assert re.search(
                r"unheard_of is unknown|of-0000\d\.safetensors is missing", str(error)
            ), error
            continue
        theirs = as_transformers_loads(directory)
        head = opened.source.read(EMBEDDING if opened.config.tie_word_embeddings else HEAD)
        assert torch.equal(theirs[HEAD], torch.from_numpy(head.astype("float32")))
        for name in opened.source.shapes():
            assert torch.equal(
                theirs[name], torch.from_numpy(opened.source.read(name).astype("float32"))
            ), name
        same += 1
    assert same > 15
