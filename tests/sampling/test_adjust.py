"""Changes to logits are those of transformers and vLLM, on any mesh."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec as P
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.sampling.adjust import adjust, ends_text, whole, with_output
from easyspec_jax.sampling.adjustments import (
    Kinds,
    RowAdjustments,
    adjustment_specs,
    row_adjustments,
)
from easyspec_jax.sampling.vocabulary import NO_CHOICE, NO_TOKEN
from easyspec_jax.sampling.warp import shard_cutoff, warp
from tests.support.helpers import on_mesh

VOCAB, EOS = 64, (2, 50)
PROMPT, OUTPUT = [5, 9, 9, 11], [9, 20, 20, 33]
# Paths below the text: its last token, the root; a node; a node below that.
DRAFTED = [[NO_TOKEN, NO_TOKEN], [20, NO_TOKEN], [7, 20]]
MESHES = [MeshShape(1, 1), MeshShape(4, 2)]

CASES = {
    "bias": SamplingParams(logit_bias={3: 2.0, 63: -100.0, 20: 0.5}),
    "length": SamplingParams(min_new_tokens=6, stop_token_ids=(7, 60)),
    "ignored": SamplingParams(min_new_tokens=5, ignore_eos=True, stop_token_ids=(7,)),
    "repetition": SamplingParams(repetition_penalty=1.7),
    "encouraged": SamplingParams(repetition_penalty=0.6),
    "presence": SamplingParams(presence_penalty=0.9),
    "frequency": SamplingParams(frequency_penalty=-0.4),
    "all": SamplingParams(
        logit_bias={9: -1.0, 40: 3.0},
        min_new_tokens=5,
        stop_token_ids=(33,),
        presence_penalty=0.3,
        frequency_penalty=0.7,
        repetition_penalty=1.3,
    ),
}


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1, len(DRAFTED), VOCAB)).astype(np.float32) * 3


def adjusted(
    logits: np.ndarray,
    sampling: SamplingParams,
    mesh: MeshShape,
    replicated: bool = False,
    warped: bool = False,
) -> np.ndarray:
    """Adjust the logits of the nodes, after the output has come in two parts."""
    kinds = Kinds.of(sampling)
    rows = row_adjustments(kinds, sampling, [PROMPT], VOCAB)
    position = np.asarray([[len(PROMPT) + len(OUTPUT) + depth for depth in range(3)]], np.int32)
    axes = () if replicated else ALL_AXES

    def body(logits: jax.Array, rows: RowAdjustments) -> jax.Array:
        for first, num_tokens in ((0, 3), (3, 1)):
            tokens = np.zeros((1, 3), np.int32)
            tokens[0, :num_tokens] = OUTPUT[first : first + num_tokens]
            tokens[0, num_tokens:] = 1  # does not count
            rows = with_output(rows, tokens, np.asarray([num_tokens], np.int32))  # pyright: ignore
        rows = whole(rows) if replicated else rows
        drafted = np.asarray([DRAFTED], np.int32)
        result = adjust(logits, position, drafted, rows, EOS, axes)  # pyright: ignore[reportArgumentType]
        if not warped:
            return result
        flat = result[0]
        temperature, top_k, top_p, min_p = (
            np.full(3, x, dtype)
            for x, dtype in (
                (sampling.temperature, np.float32),
                (sampling.top_k, np.int32),
                (sampling.top_p, np.float32),
                (sampling.min_p, np.float32),
            )
        )
        cut = shard_cutoff(flat, temperature, top_k, top_p, axes, min_p)  # pyright: ignore[reportArgumentType]
        return warp(flat, temperature, cut)[None]  # pyright: ignore[reportArgumentType]

    split = P(None, None, axes or None)
    return np.asarray(on_mesh(mesh, body, (split, adjustment_specs(kinds)), split)(logits, rows))


def expected(logits: np.ndarray, sampling: SamplingParams, warped: bool = False) -> np.ndarray:
    """Apply transformers' processors in vLLM's order, and vLLM's formula for the other two."""
    result = []
    for row, path in zip(logits[0], DRAFTED, strict=True):
        output = OUTPUT + [token for token in reversed(path) if token != NO_TOKEN]
        ids = torch.tensor([PROMPT + output])
        processors: list[Any] = []
        ends = sorted({*EOS, *sampling.stop_token_ids})
        if sampling.min_new_tokens:
            least = sampling.min_new_tokens
            processors.append(MinNewTokensLengthLogitsProcessor(len(PROMPT), least, ends))  # pyright: ignore
        if sampling.biases:
            biases: Any = {(number,): bias for number, bias in sampling.biases.items()}
            processors.append(SequenceBiasLogitsProcessor(biases))
        if sampling.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
        scores = LogitsProcessorList(processors)(ids, torch.tensor(row[None]))  # pyright: ignore
        counts = np.bincount(output, minlength=VOCAB).astype(np.float32)
        scores -= sampling.frequency_penalty * torch.tensor(counts)
        scores -= sampling.presence_penalty * torch.tensor(counts > 0)
        if warped:
            for warper in (
                TemperatureLogitsWarper(sampling.temperature),
                MinPLogitsWarper(sampling.min_p),
                TopKLogitsWarper(sampling.top_k),
                TopPLogitsWarper(sampling.top_p),
            ):
                scores = warper(ids, scores)  # pyright: ignore[reportArgumentType]
        result.append(scores[0].numpy())
    return np.asarray([result])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_transformers_changes_the_same(logits, mesh, case):
    found = adjusted(logits, CASES[case], mesh)
    np.testing.assert_allclose(found, expected(logits, CASES[case]), rtol=1e-5, atol=1e-6)
    assert not np.allclose(found, logits)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_whole_distribution_is_theirs(logits, mesh):
    """Everything at once, in vLLM's order, as probabilities."""
    given = {name: getattr(CASES["all"], name) for name in CASES["all"].__dataclass_fields__}
    sampling = SamplingParams(
        **given | {"temperature": 1.4, "top_k": 30, "top_p": 0.9, "min_p": 0.02}
    )
    found = jax.nn.softmax(adjusted(logits, sampling, mesh, warped=True))
    wanted = jax.nn.softmax(expected(logits, sampling, warped=True))
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-7)
    assert 1 < np.count_nonzero(wanted[0, 0]) < 30


def test_a_draft_that_every_device_has_whole_is_changed_alike(logits):
    split = adjusted(logits, CASES["all"], MESHES[1])
    np.testing.assert_array_equal(adjusted(logits, CASES["all"], MESHES[1], replicated=True), split)


def test_neutral_numbers_change_no_bit(logits):
    """A row that asks for nothing is not changed by what its neighbours ask for."""
    kinds = Kinds(min_p=True, bias=True, stops=True, penalties=True)
    plain = row_adjustments(kinds, SamplingParams(), [PROMPT], VOCAB)
    position = np.full((1, 3), 8, np.int32)
    drafted = np.asarray([DRAFTED], np.int32)

    def body(logits: Any, rows: Any) -> Any:
        return adjust(logits, position, drafted, rows, EOS, ())  # pyright: ignore[reportArgumentType]

    found = jax.jit(body)(logits, plain)
    np.testing.assert_array_equal(found, logits)


@pytest.mark.parametrize(
    ("sampling", "ends"),
    [
        (SamplingParams(stop_token_ids=(7,)), [True, True, False, True]),
        (SamplingParams(stop_token_ids=(7,), ignore_eos=True), [False, True, False, True]),
        (SamplingParams(ignore_eos=True), [False, False, False, True]),
        (SamplingParams(), [True, False, False, True]),
    ],
)
def test_which_tokens_end_a_text(sampling, ends):
    rows = row_adjustments(Kinds.of(sampling), sampling, [PROMPT], VOCAB)
    tokens = np.asarray([[50, 7, 8, NO_CHOICE]], np.int32)
    assert ends_text(tokens, rows, EOS)[0].tolist() == ends  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("sampling", "kinds"),
    [
        (SamplingParams(), Kinds()),
        (SamplingParams(0.7, top_k=5, seed=3, stop=("a",), max_new_tokens=3), Kinds()),
        (SamplingParams(min_p=0.5), Kinds()),  # greedy decoding takes the likeliest token anyway
        (SamplingParams(0.7, min_p=0.5), Kinds(min_p=True)),
        (SamplingParams(logit_bias={1: 0.0}), Kinds(bias=True)),
        (SamplingParams(min_new_tokens=1), Kinds(stops=True)),
        (SamplingParams(repetition_penalty=1.0, presence_penalty=0.0), Kinds()),
        (SamplingParams(frequency_penalty=-0.1), Kinds(penalties=True)),
    ],
)
def test_only_what_is_asked_for_is_compiled(sampling, kinds):
    assert Kinds.of(sampling) == kinds
    arrays: Sequence[Any] = jax.tree.leaves(row_adjustments(kinds, sampling, [PROMPT], VOCAB))
    assert bool(arrays) == kinds.adjusts
