"""With a store of prefixes, every text is the one that a fresh run writes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.decode.prefixes import PrefixStore
from easyspec_jax.decode.programs import Programs
from easyspec_jax.engine.completion import Completion, EncodedPrompt
from easyspec_jax.engine.engine import Engine
from easyspec_jax.options import KVDType, Method
from tests.support.models import save_noisy_pair

LAYERS, FOUR = 5, "0,1-4"
RNG = np.random.default_rng(0)
GREEDY = SamplingParams(max_new_tokens=40)
COUPLED = SamplingParams(max_new_tokens=40, temperature=0.9, seed=3)
MIB = 1 << 20


def some(tokens: int) -> list[int]:
    return RNG.integers(4, 300, tokens).tolist()


SYSTEM, QUESTIONS = some(70), [some(30), some(20), some(140), some(9)]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Directories of a target and of a draft, which is a noisy copy of it."""
    target, draft = tmp_path_factory.mktemp("target"), tmp_path_factory.mktemp("draft")
    save_noisy_pair(target, draft, "smollm2", num_hidden_layers=LAYERS)
    return target, draft


def opened(
    pair: Any,
    mesh: str = "1",
    method: Method = "easyspec",
    kv_dtype: KVDType = "auto",
    prefix_cache: int = 64 * MIB,
    **options: Any,
) -> Engine:
    target, draft = pair
    if method == "easyspec":
        options = {"lp_strategy": FOUR} | options
    return open_model(
        target,
        None if method in ("vanilla", "ngram") else draft,
        mesh=mesh,
        platform="cpu",
        speculative=SpeculativeConfig(method=method, verifier="coupled", **options),
        dtype="float32",
        kv_dtype=kv_dtype,
        prefix_cache=prefix_cache,
    )


def complete(engine: Engine, ids: list[int], sampling: SamplingParams) -> Completion:
    (completion,) = engine.generate([EncodedPrompt("", ids)], sampling)
    return completion


def converse(engine: Engine, sampling: SamplingParams) -> tuple[list[list[int]], list[int]]:
    """Hold three turns and a branch from the first; return all answers and what was cached."""
    answers, cached = [], []

    def turn(prompt: list[int]) -> list[int]:
        completion = complete(engine, prompt, sampling)
        answers.append(completion.token_ids)
        cached.append(completion.stats.cached_tokens)
        return prompt + completion.token_ids

    first = turn(SYSTEM + QUESTIONS[0])
    turn(turn(first + QUESTIONS[1]) + QUESTIONS[2])
    turn(first + QUESTIONS[3])  # another second question
    turn(first[:90])  # a prompt that ends within a prefix
    return answers, cached


@pytest.fixture(scope="module")
def fresh(pair):
    """Plain decoding without a store, greedily and by the coupled verifier's noise."""
    engine = opened(pair, method="vanilla", prefix_cache=0)
    answers = []
    for sampling in (GREEDY, COUPLED):
        said, cached = converse(engine, sampling)
        assert cached == [0] * 5
        answers.append(said)
    return answers


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "mesh, method, options",
    [
        ("1", "vanilla", {}),
        ("1", "sd", {}),
        ("1", "tree", {}),
        ("1", "ngram", {}),
        ("1", "easyspec", {}),
        ("1", "easyspec", {"tree_width": 3, "calibration": False}),
        ("layer=2,tensor=1", "easyspec", {"tree_width": 3}),
        ("2", "sd", {"draft_tensor_parallel_size": "1"}),
        ("8", "vanilla", {}),
        ("8", "tree", {}),
        ("8", "easyspec", {}),
        ("8", "ngram", {}),
    ],
    ids=str,
)
def test_a_conversation_is_that_of_a_fresh_run(pair, fresh, mesh, method, options, monkeypatch):
    """Its caches grow, and its turns begin at any token of a chunk."""
    monkeypatch.setattr("easyspec_jax.decode.sizes.AHEAD", 1)
    engine = opened(pair, mesh, method, **options)
    levels = engine.config(GREEDY).levels
    lacking = levels + 1  # tokens of the last round
    for sampling, expected in ((GREEDY, fresh[0]), (COUPLED, fresh[1])):
        assert engine.prefixes is not None
        engine.prefixes.clear()
        answers, cached = converse(engine, sampling)
        assert answers == expected
        ends = np.cumsum([100, 40, 20, 40, 140, 40])  # prompt, answer, question, ...
        if not options.get("calibration", True):
            # The draft has no exact entries of answers.
            assert cached == [0, ends[0], ends[2], ends[1], 89]
            continue
        assert cached[0] == 0
        for found, end in ((cached[1], ends[1]), (cached[2], ends[3]), (cached[3], ends[1])):
            assert end - lacking <= found <= end
        assert cached[4] == 89


@pytest.mark.exhaustive
def test_a_prefix_of_another_text_would_be_found(pair, fresh, monkeypatch):
    """A planted fault: a prefix is taken for three tokens more than it shares."""
    right = PrefixStore.find

    def greedy(self, prompt):
        shared, prefix = right(self, prompt)
        return (shared + 3 if prefix else 0), prefix

    monkeypatch.setattr(PrefixStore, "find", greedy)
    answers, _ = converse(opened(pair, method="vanilla"), GREEDY)
    assert answers != fresh[0]


@pytest.mark.exhaustive
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_conversation_with_a_small_store_is_the_same(pair, kv_dtype):
    """Prefixes push each other out, and of long ones only the beginning is kept."""
    engine = opened(pair, kv_dtype=kv_dtype, prefix_cache=0)
    expected, _ = converse(engine, GREEDY)
    whole = opened(pair, kv_dtype=kv_dtype).prefixes
    assert whole is not None
    for entries in (100, 128, 300):
        small = opened(pair, kv_dtype=kv_dtype, prefix_cache=entries * whole.entry_bytes)
        answers, cached = converse(small, GREEDY)
        assert answers == expected
        assert small.prefixes is not None
        assert 0 < small.prefixes.bytes <= small.prefix_cache
        assert 0 < max(cached) <= entries


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh, method", [("1", "vanilla"), ("1", "easyspec"), ("8", "tree")])
def test_batches_share_a_system_message(pair, mesh, method):
    """Rows that are prefilled together start together, behind what all of them share."""
    engine, alone = opened(pair, mesh, method), opened(pair, mesh, method, prefix_cache=0)
    prompts = [EncodedPrompt("", SYSTEM + question) for question in QUESTIONS]
    for sampling in (GREEDY, COUPLED):
        assert engine.prefixes is not None
        engine.prefixes.clear()
        expected = [c.token_ids for c in alone.generate(prompts, sampling)]
        # Two batches of three rows; the second lacks two.
        found = list(engine.generate(prompts, sampling, batch_size=3))
        assert [c.token_ids for c in found] == expected
        assert [c.stats.cached_tokens for c in found] == [0, 0, 0, 70]
        again = list(engine.generate(prompts, sampling, batch_size=3))
        assert [c.token_ids for c in again] == expected
        # 140 and 9 tokens after the system message: all start where the shortest prompt ends.
        assert [c.stats.cached_tokens for c in again] == [89, 89, 89, 78]


@pytest.mark.exhaustive
@pytest.mark.parametrize("mesh, method", [("1", "vanilla"), ("1", "easyspec"), ("8", "sd")])
def test_rows_that_enter_share_a_system_message(pair, mesh, method, monkeypatch):
    """With running texts too, so all but the first row of the first batch find it."""
    monkeypatch.setattr("easyspec_jax.decode.sizes.AHEAD", 1)
    engine, alone = opened(pair, mesh, method), opened(pair, mesh, method, prefix_cache=0)
    prompts = [SYSTEM + question for question in (*QUESTIONS, some(300), QUESTIONS[0])]
    limits = (3, 40, 9, 30, 20, 5)
    rows, expected = [], []
    for ids, limit in zip(prompts, limits, strict=True):
        sampling = replace(COUPLED, max_new_tokens=limit, seed=limit)
        rows.append(engine.row(EncodedPrompt("", ids), sampling))
        expected.append(complete(alone, ids, sampling).token_ids)
    found = dict(engine.complete_each(iter(rows), 2))
    assert [found[number].token_ids for number in range(6)] == expected
    assert [found[number].stats.cached_tokens for number in range(6)] == [0, 70, 70, 70, 70, 99]


@pytest.mark.exhaustive
def test_a_stop_string_within_a_round_ends_nothing_of_a_prefix(pair):
    """The devices write on behind it until the host has seen it."""
    alone, engine = opened(pair, prefix_cache=0), opened(pair)
    ids = SYSTEM + QUESTIONS[0]
    whole = complete(alone, ids, GREEDY)
    stop = whole.text[4:6]
    cut = replace(GREEDY, stop=(stop,))
    assert complete(engine, ids, cut).text == whole.text[: whole.text.index(stop)]
    following = ids + whole.token_ids[:3] + QUESTIONS[1]
    found = complete(engine, following, GREEDY)
    assert found.token_ids == complete(alone, following, GREEDY).token_ids
    assert found.stats.cached_tokens >= 100


@pytest.mark.exhaustive
def test_what_ctrl_c_left_is_a_prefix(pair):
    alone, engine = opened(pair, prefix_cache=0), opened(pair)
    ids, pieces = SYSTEM + QUESTIONS[0], []

    def interrupted(piece):
        pieces.append(piece)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(engine.generate([EncodedPrompt("", ids)], GREEDY, on_text=interrupted))
    following = ids + complete(alone, ids, GREEDY).token_ids
    found = complete(engine, following + QUESTIONS[1], GREEDY)
    assert found.token_ids == complete(alone, following + QUESTIONS[1], GREEDY).token_ids
    assert 100 < found.stats.cached_tokens < 140


@pytest.mark.exhaustive
def test_compiling_ahead_leaves_nothing_to_compile(pair):
    """But for the copy at the end of a text, of which only the end is known."""
    engine = opened(pair)
    first = SYSTEM + QUESTIONS[0]
    following = first + complete(engine, first, GREEDY).token_ids + QUESTIONS[1]
    rows = engine.prepare([EncodedPrompt("", following)])
    engine.compile(rows, GREEDY)
    run = engine.programs(GREEDY).compiled
    steps: list[Any] = [run.prefill, run.prefill_draft, run.restore, run.round, run.start]
    before = [step._cache_size() for step in steps]
    assert next(engine.generate(rows, GREEDY)).stats.cached_tokens > 100
    assert [step._cache_size() for step in steps] == before


def test_variants_have_stores_of_their_own(pair):
    engine = opened(pair, method="sd")
    assert engine.baseline().prefixes is None
    other = engine.variant(replace(engine.speculative, num_speculative_tokens=2))
    assert other.prefixes is not None and other.prefixes is not engine.prefixes
    assert opened(pair, prefix_cache=0).prefixes is None


def test_a_text_of_a_poisoned_model_is_not_kept(pair, monkeypatch):
    engine = opened(pair, method="vanilla")
    right = Programs.round

    def poisoned(self, state, *args):
        state, report = right(self, state, *args)
        changed = {"fault": report.fault + 1, "num_tokens": report.num_tokens * 0}
        return state, report._replace(done=report.done | True, **changed)

    monkeypatch.setattr(Programs, "round", poisoned)
    (completion,) = engine.generate([EncodedPrompt("", SYSTEM)], GREEDY)
    assert completion.finish_reason == "error"
    assert engine.prefixes is not None and engine.prefixes.bytes == 0
