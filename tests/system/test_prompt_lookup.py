"""Texts whose drafts are looked up are those of plain decoding, and no draft model is needed."""

import json
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.decode import round as rounds
from easyspec_jax.decode import sizes
from easyspec_jax.decode.lookup import Found, find
from easyspec_jax.engine.engine import Engine
from easyspec_jax.generate import main
from tests.support.models import save_model

PROMPTS = ["one two three one two", "x", "def add(a, b): return a + b", "to be or not to be"]
"""The last two take over rows of a batch of two."""

GREEDY = SamplingParams(max_new_tokens=120)
SAMPLED = SamplingParams(max_new_tokens=60, temperature=0.7, seed=3)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    directory = tmp_path_factory.mktemp("target")
    save_model(directory, "smollm2", num_hidden_layers=3)
    return directory


def opened(target: Any, mesh: str = "1", method: Any = "ngram", **options: Any) -> Engine:
    options = {"prompt_lookup_max": 4, "prompt_lookup_min": 1} | options
    speculative = SpeculativeConfig(method=method, **options)
    return open_model(target, mesh=mesh, platform="cpu", speculative=speculative, dtype="float32")


def refilled(engine: Engine, sampling: SamplingParams, rows: int = 2) -> list[list[int]]:
    """Complete all prompts in a batch whose rows are refilled."""
    waiting = [engine.row(prompt, sampling) for prompt in PROMPTS]
    completions = dict(engine.complete_each(waiting, rows))
    return [completions[number].token_ids for number in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def plain(target):
    engine = opened(target, method="vanilla", verifier="coupled")
    return {sampling: refilled(engine, sampling) for sampling in (GREEDY, SAMPLED)}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1", "2", "layer=2,tensor=4"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "coupled"])
def test_lookups_change_no_token(target, plain, mesh, sampling, monkeypatch):
    """Rows are refilled, and the greedy texts outgrow their caches."""
    monkeypatch.setattr(sizes, "AHEAD", 1)
    engine = opened(target, mesh)
    assert refilled(engine, sampling) == plain[sampling]
    grown = engine.programs(sampling).compiled.extend._cache_size()  # pyright: ignore[reportFunctionMemberAccess]
    assert grown >= (sampling is GREEDY)


def test_lookups_save_rounds(target, plain):
    """Random models repeat themselves, so most of what they say is found."""
    (completion,) = opened(target).generate(PROMPTS[:1], GREEDY)
    stats = completion.stats
    assert completion.token_ids == plain[GREEDY][0]
    assert stats.lookup_accepted == stats.accepted > 40
    assert stats.lookup_drafted == stats.drafted < 5 * stats.rounds
    # The limit may leave no room for the last round's own token.
    assert stats.rounds + stats.accepted + 1 - len(completion.token_ids) in (0, 1)


@pytest.mark.slow
def test_a_sampled_text_depends_on_its_request_alone(target, monkeypatch):
    """Neither the mesh nor the neighbors nor the text that had the row before matter."""
    engine = opened(target, verifier="rejection")
    together = refilled(engine, SAMPLED)
    assert refilled(engine, SAMPLED, rows=1) == together
    assert refilled(opened(target, "2", verifier="rejection"), SAMPLED) == together

    def peeking(text: Any, last: Any, lookup: Any, levels: int, corpus: None) -> Found:
        """Plant a fault: draft what stands behind the last token."""
        beyond = last[:, None] + 1 + jnp.arange(levels, dtype=jnp.int32)[None, :]
        found = find(text, last, lookup, levels)
        tokens = jnp.take_along_axis(text, beyond, axis=1)
        return found._replace(tokens=tokens, matched=jnp.ones_like(found.matched))

    monkeypatch.setattr(rounds, "find", peeking)
    assert refilled(opened(target, verifier="rejection"), SAMPLED, rows=1) != together


def test_the_command_needs_no_draft(target, capsys):
    command = ["--target", str(target), "--prompt", PROMPTS[0], "--max-new-tokens", "40"]
    texts = []
    for method in ("ngram", "vanilla"):
        assert main([*command, "--method", method, "--prompt-lookup-min", "1", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["token_ids"] == texts[1]["token_ids"]
    assert texts[0]["stats"]["lookup_accepted"] > 0 == texts[1]["stats"]["lookup_accepted"]
    assert main([*command, "--method", "ngram", "--prompt-lookup-min", "1"]) == 0
    assert "ngram on layer=1,tensor=1" in capsys.readouterr().err


@pytest.mark.slow
def test_lookups_next_to_a_draft(target, capsys):
    """The text is the same, and the summary says who drafted it."""
    words = ["--target", str(target), "--draft", str(target), "--prompt", PROMPTS[0]]
    words += ["--max-new-tokens", "60", "--lp-size", "2", "--prompt-lookup-min", "1"]
    # Rounds that adapt would draft differently in the two runs that are compared.
    words += ["--adapt", "off"]
    plain, joined = ["--method", "vanilla"], ["--prompt-lookup", "--prompt-lookup-max", "4"]
    texts = []
    for flags in (plain, joined):
        assert main([*words, *flags, "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out))
    assert texts[0]["token_ids"] == texts[1]["token_ids"]
    stats = texts[1]["stats"]
    assert 0 < stats["lookup_accepted"] <= stats["accepted"]
    assert stats["lookup_accepted"] <= stats["lookup_drafted"] <= stats["drafted"]
    assert main([*words, *joined]) == 0
    printed = capsys.readouterr().err
    share = f"{stats['lookup_accepted'] / stats['accepted']:.0%}"
    assert f"{share} of accepted looked up" in printed
    assert "easyspec, prompt lookup on" in printed


@pytest.fixture(scope="module")
def corpus(target, plain, tmp_path_factory):
    """A file with the greedy texts of the first two prompts, as far as they are UTF-8."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    engine = opened(target, method="vanilla")
    texts = [engine.tokenizer.decode(ids) for ids in plain[GREEDY][:2]]
    path.write_text("\n\n".join([*PROMPTS, *texts]), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ("1", {}),
        pytest.param("layer=2,tensor=4", {"adapt": True}, marks=pytest.mark.slow),
        pytest.param("2", {"prompt_lookup_max": 16}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_corpus_changes_no_token(target, plain, corpus, mesh, options, monkeypatch):
    """Rows are refilled, and texts outgrow their caches."""
    monkeypatch.setattr(sizes, "AHEAD", 1)
    engine = opened(target, mesh, prompt_lookup_corpus=corpus, **options)
    for sampling in (GREEDY, SAMPLED):
        assert refilled(engine, sampling) == plain[sampling]


def test_a_corpus_finds_what_a_text_has_not_said_yet(target, plain):
    """It holds the text that is about to be said, not as a file: random bytes are no UTF-8."""
    alone = opened(target, prompt_lookup_min=2)
    said = [*alone.encode(PROMPTS[0]), *plain[GREEDY][0]]
    counts = []
    for engine in (alone, replace(alone, corpus=np.array(said, np.int32))):
        (completion,) = engine.generate(PROMPTS[:1], replace(GREEDY, max_new_tokens=24))
        assert completion.token_ids == plain[GREEDY][0][:24]
        counts.append(completion.stats.rounds)
    assert counts[1] <= 5 < counts[0]  # 23 tokens after the first, six a round


def test_a_variant_has_its_own_corpus(target, corpus):
    engine = opened(target)
    other = engine.variant(SpeculativeConfig(method="ngram", prompt_lookup_corpus=corpus))
    assert engine.corpus is None and other.corpus is not None
    assert other.variant(SpeculativeConfig(method="ngram")).corpus is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: .*No such file"),
        (b"\xff\xfe", "cannot be read: .*utf-8"),
        (b"", "holds no text that the target knows"),
        (b"a" * (1 << 20) + b"b", "is too large: at most 1048576 tokens, 64 MiB"),
    ],
)
def test_a_corpus_that_cannot_be_used(target, tmp_path, content, message):
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(EasySpecError, match=f"`prompt_lookup_corpus` .*corpus.txt {message}"):
        opened(target, prompt_lookup_corpus=str(path))


def test_a_corpus_of_too_many_bytes(target, tmp_path):
    """The limit falls inside a character, which is not a mistake in the file."""
    path = tmp_path / "corpus.txt"
    path.write_bytes("é".encode() * (33 << 20))
    with pytest.raises(EasySpecError, match=r"corpus.txt is too large: .*64 MiB"):
        opened(target, prompt_lookup_corpus=str(path))
