"""Odd command lines, prompts and conversations give text or one line of error."""

import contextlib
import io
import random
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from easyspec_jax import demo
from easyspec_jax.engine.pair import open_model
from easyspec_jax.errors import EasySpecError
from easyspec_jax.generate import main
from easyspec_jax.tokenizer import TextStream, encode, load_tokenizer
from tests.support.models import byte_tokenizer, save_model

pytestmark = pytest.mark.slow

CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


def fuzz(examples: int) -> Any:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=CHECKS,
    )


NUMBERS = st.sampled_from(
    [
        *("0", "1", "2", "-1", "7", "64", "65", "1e9", "nan", "inf", "-inf", "1_0", "٣", "0x1"),
        *("", " ", "2.5", str(2**31), str(2**64), "9" * 5000, "1e-400"),
    ]
)
ODD = st.sampled_from(
    [
        *("", " ", "\0", "\n", "\udcff", "👍🏽", "a\u202eb", "\ufeff", "\ufffd"),
        *("--", "-", "=", ",", "..", "/"),
    ]
)
TEXTS = ODD | st.text(max_size=12) | st.text(st.characters(), max_size=12)
# Flags, by the values that they take: numbers, names, and none.
WHOLE = (
    *("--batch-size", "--num-speculative-tokens", "--tree-width", "--tree-nodes", "--lp-size"),
    *("--mlp-lp-size", "--top-k", "--seed", "--max-new-tokens", "--max-length"),
    *("--temperature", "--top-p"),
)
NAMED = (
    *("--mesh", "--platform", "--dtype", "--method", "--lp-strategy", "--refit"),
    *("--draft-tensor-parallel-size", "--verifier", "--target", "--draft", "--prompt-file"),
    *("--stop", "--prompt"),
)
KNOWN = st.sampled_from(
    [
        *(
            "auto",
            "1",
            "8",
            "9",
            "layer=2,tensor=2",
            "layer=0,tensor=1",
            "cpu",
            "gpu",
            "float32",
            "int8",
        ),
        *("vanilla", "sd", "tree", "easyspec", "0,1-2", "0-5", "3-1", "all", "none", "rejection"),
        *("coupled", "/dev/null", "/proc/self/mem", "."),
    ]
)
SWITCHES = st.sampled_from(
    [
        *("--no-refit", "--no-calibration", "--chat", "--json", "--no-stream", "--compare"),
        *("--verbose", "--unknown", "--prompt", "stray"),
    ]
)
FLAGS = st.one_of(
    st.tuples(st.sampled_from(WHOLE), NUMBERS | TEXTS),
    st.tuples(st.sampled_from(NAMED), KNOWN | TEXTS | NUMBERS),
    st.tuples(SWITCHES),
)


def check(argv: list[str]) -> int:
    printed, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = main(argv)
    assert code in (0, 2), argv
    if code == 2:
        assert errors.getvalue().count("\n") == 1, (argv, errors.getvalue())
        assert errors.getvalue().startswith("easyspec_jax.generate: error: ")
        assert printed.getvalue() == ""
    return code


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "llama3", vocab_size=260, num_hidden_layers=2)
    return directory


@pytest.fixture
def idle(monkeypatch):
    """Check everything but compute nothing."""
    from easyspec_jax.engine.engine import Engine

    def stop(self, bar):
        raise EasySpecError("everything was well")

    monkeypatch.setattr(Engine, "load", stop)
    # What tunes itself runs models for minutes, and has tests of its own.
    monkeypatch.setattr("easyspec_jax.tune.tuning.auto", stop_tuning)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))


def stop_tuning(*args: Any) -> None:
    raise EasySpecError("everything was well")


@fuzz(600)
@given(flags=st.lists(FLAGS, max_size=6), pair=st.booleans())
def test_command_lines(model, idle, flags, pair):
    argv = [word for flag in flags for word in flag]
    known = (
        ["--platform", "cpu", "--target", str(model), "--draft", str(model), "--lp-size", "1"]
        if pair
        else []
    )
    check([*known, *argv])


@fuzz(25)
@given(
    prompts=st.lists(TEXTS, min_size=1, max_size=2),
    temperature=st.sampled_from(["0", "1"]),
    switches=st.lists(
        st.sampled_from(["--json", "--no-stream", "--chat", "--compare"]), max_size=2
    ),
)
def test_texts_that_are_decoded(model, prompts, temperature, switches):
    argv = [
        "--platform",
        "cpu",
        "--target",
        str(model),
        "--method",
        "vanilla",
        "--max-new-tokens",
        "2",
    ]
    check(
        [
            *argv,
            "--temperature",
            temperature,
            *switches,
            *(f"--prompt={prompt}" for prompt in prompts),
        ]
    )


VALUES = st.none() | st.integers() | st.binary(max_size=3) | TEXTS | st.lists(TEXTS, max_size=2)
MESSAGES = st.fixed_dictionaries(
    {}, optional={"role": TEXTS | VALUES, "content": TEXTS | VALUES, "more": VALUES}
)
PROMPTS = VALUES | st.lists(MESSAGES | VALUES, max_size=3) | MESSAGES
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}{% endfor %}{{ bos_token }}"
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@fuzz(400)
@given(prompt=PROMPTS, chat=st.booleans())
def test_prompts_and_conversations(tokenizer, prompt, chat):
    try:
        ids = encode(tokenizer, prompt, chat)
    except EasySpecError as error:
        assert "\n" not in str(error)
    else:
        assert ids and all(0 <= number < len(tokenizer) for number in ids)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("chat", [False, True])
def test_prompts_of_100_000_characters(tokenizer, seed, chat):
    chance = random.Random(seed)
    alphabet = [
        "a",
        "👍",
        string.printable,
        "\0",
        "é\u0301",
        "\u4e00",
        " ",
        "\n",
        "ab",
        "\U0010ffff",
    ][seed]
    text = "".join(chance.choice(alphabet) for _ in range(100_000))
    assert encode(tokenizer, text, chat)
    assert encode(load_tokenizer(demo.TARGET), text)
    with pytest.raises(EasySpecError, match="leaves no room within `max_length`"):
        open_model(platform="cpu").encode(text)


@fuzz(100)
@given(
    ids=st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 300), max_size=30),
    stop=st.lists(TEXTS.filter(len)),
)
def test_tokens_outside_the_vocabulary(tokenizer, ids, stop):
    stream = TextStream(tokenizer, stop)
    shown = "".join(stream.push([number]) for number in ids if not stream.stopped) + stream.rest()
    assert shown == stream.text
