"""Whole generations with every sampling option: one text whatever the draft, mesh and batch."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from easyspec_jax import SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.arithmetic import power_of_two
from easyspec_jax.engine.needs import bytes_per_entry, needed
from easyspec_jax.sampling.adjustments import Kinds
from tests.support.models import save_model

VOCAB, EOS = 260, 3
# Of several chunks, and less.
PROMPTS = ["Hello, " * 25, "b", "the cat sat"]
EVERYTHING = SamplingParams(
    temperature=0.9,
    top_k=200,
    top_p=0.97,
    seed=5,
    max_new_tokens=24,
    min_p=0.001,
    logit_bias={100: 2.0, 101: 1.5, 102: -5.0},
    min_new_tokens=6,
    ignore_eos=True,
    stop_token_ids=(77, 78),
    presence_penalty=0.4,
    frequency_penalty=0.3,
    repetition_penalty=1.2,
    bad_words_ids=((100, 101), (50,), (101, 100, 101)),
    logprobs=3,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A target, a draft with other weights, and the target in transformers."""
    directory = tmp_path_factory.mktemp("models")
    reference = save_model(directory / "target", "llama3", vocab_size=VOCAB, eos_token_id=EOS)
    save_model(directory / "draft", "llama3", seed=1, vocab_size=VOCAB, eos_token_id=EOS)
    return directory, reference


@pytest.fixture(scope="module")
def opened(models):
    """Return a function that opens the pair, or the target as its own draft."""
    directory, _ = models

    @cache
    def open_pair(mesh="1", own=False, **speculative):
        config = SpeculativeConfig(**speculative)
        draft = None if config.method == "vanilla" else directory / ("target" if own else "draft")
        return open_model(directory / "target", draft, speculative=config, mesh=mesh)

    return open_pair


@pytest.fixture(scope="module")
def plainly(opened):
    """Plain decoding, one prompt after another."""
    return list(opened(method="vanilla", verifier="coupled").generate(PROMPTS, EVERYTHING))


WAYS = {
    "own draft": {"method": "sd", "own": True},
    "tree": {"method": "tree", "tree_nodes": 9},
    "groups of 3": {"lp_size": 3},
    "groups on 2 devices": {"lp_size": 2, "tree_width": 3, "mesh": "2"},
    "groups on 8 devices": {"lp_size": 4, "tree_width": 4, "mesh": "8"},
    "replicated draft": {"lp_size": 3, "mesh": "8", "draft_tensor_parallel_size": "1"},
}
BATCH_SIZES = dict.fromkeys(WAYS, 3) | {"own draft": 1, "groups on 2 devices": 2}


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", WAYS)
def test_one_seed_is_one_text_with_everything_on(opened, plainly, way):
    engine = opened(verifier="coupled", **WAYS[way])
    found = list(engine.generate(PROMPTS, EVERYTHING, batch_size=BATCH_SIZES[way]))
    for one, other in zip(found, plainly, strict=True):
        assert one.token_ids == other.token_ids
        assert one.finish_reason == other.finish_reason
        assert one.logprobs is not None
        np.testing.assert_allclose(
            [token.logprob for token in one.logprobs],
            [token.logprob for token in other.logprobs],
            atol=1e-4,
        )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("temperature", "verifier"), [(0.0, "coupled"), (0.9, "coupled"), (0.9, "rejection")]
)
def test_refilled_rows_of_other_options_are_what_they_are_alone(opened, temperature, verifier):
    """Each row has its own options, and one program serves all."""
    engine = opened(lp_size=3, tree_width=3, verifier=verifier)
    neutral = SamplingParams(temperature, max_new_tokens=20)
    fields = (
        {"logit_bias": {100: 3.0}},
        {"repetition_penalty": 1.5},
        {},
        {"min_new_tokens": 12, "stop_token_ids": tuple(range(100, 160))},
        {"bad_words_ids": ((100,), (101, 102))},
        {"min_p": 0.3},
        {"frequency_penalty": 1.0, "presence_penalty": 0.5},
    )
    wanted = [replace(neutral, seed=seed, **own) for seed, own in enumerate(fields)]
    kinds = Kinds()
    for sampling in wanted:
        kinds |= Kinds.of(sampling)

    def rows(some):
        for number in some:
            yield engine.row(PROMPTS[number % 3], wanted[number], kinds=kinds)

    together = dict(engine.complete_each(rows(range(len(wanted))), 2))
    for number, sampling in enumerate(wanted):
        ((_, alone),) = engine.complete_each(rows([number]), 1)
        assert together[number].token_ids == alone.token_ids, sampling
        assert together[number].finish_reason == alone.finish_reason
    # By programs that know nothing else.
    (plain,) = engine.generate([PROMPTS[2]], wanted[2])
    assert together[2].token_ids == plain.token_ids


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", ["vanilla", "groups of 3", "tree"])
def test_greedy_text_is_that_of_transformers(models, opened, way):
    engine = opened(**WAYS.get(way, {"method": way}))
    sampling = SamplingParams(
        max_new_tokens=40,
        logit_bias={100: 1.0, 101: 0.5},
        repetition_penalty=1.3,
        bad_words_ids=((100, 101), (55,), (110,)),
        min_new_tokens=30,
    )
    for prompt in PROMPTS:
        (found,) = engine.generate([prompt], sampling)
        ids = torch.tensor([found.prompt_ids])
        expected = models[1].generate(
            ids,
            max_new_tokens=40,
            min_new_tokens=30,
            do_sample=False,
            repetition_penalty=1.3,
            bad_words_ids=[[100, 101], [55], [110]],
            sequence_bias=[[[100], 1.0], [[101], 0.5]],
            pad_token_id=0,
        )
        assert found.token_ids == expected[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("way", ["vanilla", "tree"])
def test_logprobs_are_of_the_targets_own_distribution(models, opened, way):
    """Before biases, penalties and temperature: those of transformers' logits for the same text."""
    engine = opened(**WAYS.get(way, {"method": way}))
    found = next(engine.generate(PROMPTS[:1], replace(EVERYTHING, prompt_logprobs=2)))
    ids = [*found.prompt_ids, *found.token_ids]
    with torch.no_grad():
        logits = models[1](torch.tensor([ids])).logits[0].numpy()
    expected = log_softmax(logits.astype(np.float64), axis=-1)
    first, *of_prompt = found.prompt_logprobs
    assert first is None
    listed = [*of_prompt, *found.logprobs]
    assert [token.token_id for token in listed] == ids[1:]
    for place, token in enumerate(listed):
        best = 2 if place < len(of_prompt) else 3
        assert token.logprob == pytest.approx(expected[place, token.token_id], abs=1e-4)
        values = [logprob for _, logprob in token.top]
        np.testing.assert_allclose(values, np.sort(expected[place])[::-1][:best], atol=1e-4)
        np.testing.assert_allclose(
            values, [expected[place, number] for number, _ in token.top], atol=1e-4
        )
    printed = json.loads(json.dumps(found.as_dict()))
    assert printed["prompt_logprobs"][0] is None
    assert printed["logprobs"][0]["token_id"] == found.token_ids[0]
    assert len(printed["logprobs"][0]["top_logprobs"]) == 3


def test_tokens_that_a_stop_string_cuts_off_have_no_logprobs(opened):
    engine = opened(method="sd", own=True)
    plain = next(engine.generate(["b"], SamplingParams(max_new_tokens=12)))
    stop = plain.text[2:4]
    (found,) = engine.generate(["b"], SamplingParams(max_new_tokens=12, stop=(stop,), logprobs=0))
    assert found.finish_reason == "stop"
    assert [token.token_id for token in found.logprobs] == found.token_ids
    assert found.prompt_logprobs is None


def test_what_ends_a_text(opened):
    engine = opened(method="sd", own=True)
    sampled = SamplingParams(0.9, seed=1, max_new_tokens=12)
    plain = next(engine.generate(["b"], sampled)).token_ids
    place = next(i for i, token in enumerate(plain) if i > 2 and token not in plain[:i])
    own = replace(sampled, stop_token_ids=(plain[place],))
    stopped = next(engine.generate(["b"], own))
    assert stopped.token_ids == plain[: place + 1]
    assert stopped.finish_reason == "stop"
    later = next(engine.generate(["b"], replace(own, min_new_tokens=12)))
    assert len(later.token_ids) == 12
    assert plain[place] not in later.token_ids[:-1]
    ended = SamplingParams(max_new_tokens=12, logit_bias={EOS: 100.0})
    assert next(engine.generate(["b"], ended)).token_ids == [EOS]
    ignored = next(engine.generate(["b"], replace(ended, ignore_eos=True)))
    assert ignored.token_ids == [EOS] * 12
    assert ignored.finish_reason == "length"


def test_several_texts_for_a_prompt(opened):
    engine = opened(method="sd", own=True)
    sampling = SamplingParams(0.9, seed=7, max_new_tokens=6, n=3)
    found = list(engine.generate(PROMPTS[1:], sampling, batch_size=2))
    assert [text.prompt for text in found] == [PROMPTS[1]] * 3 + [PROMPTS[2]] * 3
    for number, text in enumerate(found):
        one = replace(sampling, n=1, seed=7 + number)
        assert next(engine.generate([text.prompt], one)).token_ids == text.token_ids
    assert len({tuple(text.token_ids) for text in found}) > 3


@pytest.mark.parametrize("batch_size", [1, 2, pytest.param(3, marks=pytest.mark.exhaustive)])
def test_several_texts_prefill_a_long_prompt_once(opened, batch_size, monkeypatch):
    """In one batch or several: compile() covers every step, and memory checks count the copy."""
    engine, prompt = opened(method="easyspec", own=True), "b" * 90
    sampling = SamplingParams(0.9, seed=7, max_new_tokens=6, n=3)
    rows = engine.prepare([prompt])
    engine.compile(rows, sampling, batch_size=batch_size)
    run = engine.programs(sampling).compiled
    steps = [run.enter, run.enter_draft, run.copy_row, run.restore, run.prefill, run.prefill_draft]
    compiled = [step._cache_size() for step in steps]  # pyright: ignore[reportFunctionMemberAccess]
    found = list(engine.generate(rows, sampling, batch_size=batch_size))
    assert [step._cache_size() for step in steps] == compiled  # pyright: ignore[reportFunctionMemberAccess]
    length = len(rows[0].ids)
    assert [text.stats.cached_tokens for text in found] == [0, length - 1, length - 1]
    for number, text in enumerate(found):
        one = replace(sampling, n=1, seed=7 + number)
        assert next(engine.generate([prompt], one)).token_ids == text.token_ids
    needs = [needed(engine.workload(200, length, 1, replace(sampling, n=n))) for n in (1, 2)]
    assert needs[1].caches == needs[0].caches + bytes_per_entry(
        engine.workload(2, 1, 1, SamplingParams())
    ) * max(128, power_of_two(length))
