"""Rounded matrices change the model, never what speculation makes of it."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from convert.converting import ConvertConfig, convert
from convert.huggingface import open_huggingface
from convert.stream import convert as convert_model
from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.checkpoint.quantized import (
    Dequantized,
    Quantized,
    offset_name,
    scale_name,
    stored_integers,
)
from easyspec_jax.checkpoint.tensors import Held, Overlay
from easyspec_jax.engine.needs import needed
from tests.support.models import save_model

PROMPTS = ["a quick brown fox", "the"]
WAYS = {
    "sd": SpeculativeConfig(method="sd", num_speculative_tokens=3, verifier="coupled"),
    "tree": SpeculativeConfig(method="tree", num_speculative_tokens=3, tree_width=2),
    "easyspec": SpeculativeConfig(lp_size=2, tree_width=2, num_speculative_tokens=3),
    "replicated": SpeculativeConfig(
        lp_size=3, draft_tensor_parallel_size="1", verifier="coupled", num_speculative_tokens=3
    ),
}
GREEDY, SAMPLED = SamplingParams(max_new_tokens=24), SamplingParams(0.9, seed=5, max_new_tokens=24)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """A target with biases, whose heads do not divide among eight devices, and its draft."""
    target, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    save_model(target, "qwen2", seed=1)
    save_model(draft, "qwen2", seed=1, num_hidden_layers=4)
    return target, draft


def _texts(directories, sampling, **options):
    engine = open_model(*directories, **options)
    return [done.token_ids for done in engine.generate(PROMPTS, sampling, batch_size=2)]


@pytest.fixture(scope="module")
def plain(directories):
    """Texts of plain decoding on one device, by the target's type and temperature."""
    target, _ = directories
    texts = {}
    for weights in (None, "bfloat16", "int8", "int4"):
        for sampling in (GREEDY, SAMPLED):
            vanilla = SpeculativeConfig(method="vanilla", verifier="coupled")
            key = weights, sampling.temperature
            texts[key] = _texts((target,), sampling, speculative=vanilla, weights=weights)
    return texts


def test_rounding_changes_the_model(plain):
    """Otherwise the tests below would prove nothing."""
    assert plain["int8", 0.9] != plain[None, 0.9]
    assert plain["int4", 0.0] != plain[None, 0.0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh", ["1", "layer=2,tensor=1", "layer=2,tensor=4"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("weights, draft_weights", [("int8", "int4"), ("int4", None)])
def test_a_rounded_target_drafted_for_says_what_it_says_alone(
    directories, plain, mesh, way, weights, draft_weights
):
    for sampling in (GREEDY, SAMPLED):
        texts = _texts(
            directories,
            sampling,
            mesh=mesh,
            speculative=WAYS[way],
            weights=weights,
            draft_weights=draft_weights,
        )
        assert texts == plain[weights, sampling.temperature]


@pytest.mark.exhaustive
@pytest.mark.parametrize("draft_weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("mesh", ["1", "layer=4,tensor=2"])
def test_a_rounded_draft_leaves_the_text_alone(directories, plain, draft_weights, mesh):
    for sampling in (GREEDY, SAMPLED):
        options = {"mesh": mesh, "speculative": WAYS["easyspec"], "draft_weights": draft_weights}
        assert _texts(directories, sampling, **options) == plain[None, sampling.temperature]


def test_a_type_that_is_wider_than_the_stored_one_is_refused(directories, tmp_path):
    convert(directories[0], tmp_path / "int4", ConvertConfig(weights="int4"))
    stored = "int4: matrices are stored as int4, and `{}` int8 would only take more memory"
    with pytest.raises(EasySpecError, match=stored.format("weights")):
        open_model(tmp_path / "int4", directories[1], weights="int8")
    with pytest.raises(EasySpecError, match=stored.format("draft_weights")):
        open_model(directories[0], tmp_path / "int4", draft_weights="int8")


def test_int8_on_disk_and_int4_in_memory_are_reported_and_counted_as_int4(directories, tmp_path):
    convert(directories[0], tmp_path / "int8", ConvertConfig(weights="int8"))
    options: Any = {"weights": "int4", "draft_weights": "bfloat16", "dtype": "bfloat16"}
    engine = open_model(tmp_path / "int8", directories[1], **options)
    # The draft's type is the one that is computed in.
    assert engine.kept_weights == "target int4"
    workload = engine.workload(256, 16, 1, GREEDY)
    target: Any = engine.load()[0]
    assert target.blocks[0].mlp.down.weight.dtype == "int4"
    held = sum(array.nbytes for array in jax.tree.leaves(engine.load()))
    assert needed(workload).weights == held


def test_each_matrix_counts_as_it_is_stored(directories, tmp_path):
    """Layers of one checkpoint are in int4, int8 and floats."""
    source = open_huggingface(directories[0])
    below, above = Quantized(source.source, "int8"), Quantized(source.source, "int4")
    held = {}
    for name in below.shapes():
        if ".layers.1." in name or ".layers.2.mlp" in name:
            held[name] = (above if ".layers.1." in name else below).read(name)
    model = replace(source, source=Overlay(source.source, Held(held)))
    convert_model(model, tmp_path / "mixed")
    engine = open_model(tmp_path / "mixed", speculative=SpeculativeConfig(method="vanilla"))
    workload = engine.workload(256, 16, 1, GREEDY)
    assert engine.kept_weights == "target int4"  # of more matrices than int8
    target: Any = engine.load()[0]
    dtypes = [str(block.mlp.down.weight.dtype) for block in target.blocks]
    assert dtypes == ["float32", "int4", "int8", *dtypes[3:]] and set(dtypes[3:]) == {"float32"}
    assert needed(workload).weights == sum(array.nbytes for array in jax.tree.leaves(target))


@pytest.fixture(scope="module")
def with_offsets(tmp_path_factory):
    """A pair in int4 whose groups have offsets, as zero points of AWQ's make them."""
    random, found = np.random.default_rng(0), []
    sizes = {"hidden_size": 128, "intermediate_size": 96, "num_attention_heads": 8}
    for layers in (6, 4):
        directory = tmp_path_factory.mktemp("floats")
        save_model(directory, "qwen2", seed=1, num_hidden_layers=layers, **sizes)
        model = open_huggingface(directory)
        int4, held = Quantized(model.source, "int4", 32), {}
        for name, dtype, _, _ in stored_integers(int4):
            if dtype == "int4":
                scale = int4.read(scale_name(name))
                offset = (scale * random.integers(-2, 3, scale.shape)).astype(np.float32)
                held |= {name: int4.read(name), scale_name(name): scale, offset_name(name): offset}
        found.append(tmp_path_factory.mktemp("offsets") / directory.name)
        convert_model(replace(model, source=Overlay(model.source, Held(held))), found[-1])
    return found


@pytest.mark.parametrize("mesh", ["1", "layer=2,tensor=4"])
def test_a_pair_with_offsets_says_what_its_target_says_alone(with_offsets, mesh):
    vanilla = SpeculativeConfig(method="vanilla", verifier="coupled")
    target = with_offsets[0]
    for sampling in (GREEDY, SAMPLED):
        alone = _texts((target,), sampling, speculative=vanilla)
        assert _texts(with_offsets, sampling, mesh=mesh, speculative=WAYS["easyspec"]) == alone


@pytest.mark.parametrize("mesh", ["1", "layer=2,tensor=4"])
def test_offsets_are_a_part_of_both_models(with_offsets, mesh):
    """Models of floats write the same texts after the same drafts; without offsets, others."""

    def made(change):
        engine = open_model(*with_offsets, mesh=mesh, speculative=WAYS["easyspec"])
        assert engine.draft is not None
        engine.target = replace(engine.target, source=change(engine.target.source))
        engine.draft = replace(engine.draft, source=change(engine.draft.source))
        done = list(engine.generate(PROMPTS, GREEDY))
        return [(each.token_ids, each.stats.accepted) for each in done]

    def without(source):
        kept = {name: source.read(name) for name in source.shapes() if "offset" not in name}
        return Held(kept)

    found = made(lambda source: source)
    assert found == made(Dequantized)
    assert found != made(without)


def test_offsets_take_memory(with_offsets):
    engine = open_model(*with_offsets, speculative=WAYS["easyspec"])
    workload = engine.workload(256, 16, 1, GREEDY)
    held = sum(array.nbytes for array in jax.tree.leaves(engine.load()))
    assert needed(workload).weights == held


def test_an_unknown_type_is_one_line(directories):
    with pytest.raises(EasySpecError, match="`weights` 'int3' is not one of bfloat16, int8, int4"):
        open_model(*directories, weights="int3")  # pyright: ignore[reportArgumentType]
    with pytest.raises(EasySpecError, match="`draft_weights` 'int3' is not one of"):
        open_model(*directories, draft_weights="int3")  # pyright: ignore[reportArgumentType]
