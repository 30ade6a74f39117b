"""A conversation remembers what was said, and goes on after whatever goes wrong."""

from dataclasses import replace
from io import StringIO

import pytest

from easyspec_jax.cli.chat import converse
from easyspec_jax.engine.engine import Engine
from easyspec_jax.engine.pair import open_model
from easyspec_jax.generate import main
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.progress import no_bar
from tests.support.models import byte_tokenizer, save_model

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny checkpoint with a chat template."""
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, "llama3", vocab_size=260, eos_token_id=3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def engine(directory):
    return open_model(directory, speculative=SpeculativeConfig(method="vanilla"), max_length=120)


@pytest.fixture
def asked(engine, monkeypatch):
    """What the engine was asked, as the template spells it."""
    seen = []
    generate = Engine.generate

    def spy(self, prompts, sampling, **options):
        seen.append((engine.tokenizer.decode(prompts[0].ids), sampling.seed))
        return generate(self, prompts, sampling, **options)

    monkeypatch.setattr(Engine, "generate", spy)
    return seen


def reader(*lines):
    """Brings the lines, then the end of the input; an exception among them is raised."""
    rest = list(lines)

    def read(prompt):
        if not rest:
            raise EOFError
        return rest.pop(0)

    return read


SAMPLING = SamplingParams(max_new_tokens=4, seed=7)


def test_every_answer_sees_all_that_was_said_until_it_is_forgotten(engine, asked, capsys):
    converse(
        engine, SAMPLING, no_bar, reader("one", "  ", "two", "/clear", "three", "/exit", "four")
    )
    output = capsys.readouterr()
    first, second, third, _ = output.out.split("\n")
    assert asked == [
        ("[user]one[assistant]", 7),
        (f"[user]one[assistant]{first}[user]two[assistant]", 8),
        ("[user]three[assistant]", 7),
    ]
    assert second
    assert third
    assert output.err.count("tokens/s") == 3


def test_a_turn_prefills_only_what_is_new(directory, asked, capsys):
    """And says so; the answers are the same."""
    plain = SpeculativeConfig(method="vanilla")
    said = []
    for size in (0, 1 << 20):
        engine = open_model(directory, speculative=plain, max_length=400, prefix_cache=size)
        converse(engine, SAMPLING, no_bar, reader("one " * 10, "two"), system="be brief")
        output = capsys.readouterr()
        said.append(output.out)
        assert ("tokens cached" in output.err) == bool(size)
    assert said[0] == said[1]


def test_commands_do_not_reach_the_model(engine, asked, capsys):
    converse(engine, SAMPLING, no_bar, reader("/help", "one", "/quit", "two"))
    assert [text for text, _ in asked] == ["[user]one[assistant]"]
    assert capsys.readouterr().err.count("/clear forgets the conversation") == 1


def test_a_system_message_stays_whatever_is_forgotten(engine, asked, capsys):
    converse(engine, SAMPLING, no_bar, reader("one", "/clear", "two"), system="be brief")
    assert asked == [
        ("[system]be brief[user]one[assistant]", 7),
        ("[system]be brief[user]two[assistant]", 7),
    ]


def test_what_does_not_fit_is_not_remembered(engine, asked, capsys):
    converse(engine, SAMPLING, no_bar, reader("one", "x" * 200, "two"))
    output = capsys.readouterr()
    assert "leaves no room within --max-length 120" in output.err
    assert "/clear" in output.err
    first, _, _ = output.out.partition("\n")
    assert asked[-1][0] == f"[user]one[assistant]{first}[user]two[assistant]"


def test_ctrl_c_cuts_an_answer_short_and_keeps_what_was_said(engine, asked, capsys, monkeypatch):
    import builtins

    shown = []

    def interrupted(*pieces, **options):
        builtins.print(*pieces, **options)
        shown.extend(piece for piece in pieces if piece)
        if pieces and len(shown) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("easyspec_jax.cli.chat.print", interrupted, raising=False)
    converse(engine, SAMPLING, no_bar, reader("one", "two"))
    assert asked[1][0] == f"[user]one[assistant]{''.join(shown[:2])}[user]two[assistant]"


def test_an_answer_that_never_came_is_not_remembered(engine, asked, capsys, monkeypatch):
    generate, interrupted = Engine.generate, []

    def interrupt_once(self, prompts, sampling, **options):
        if not interrupted:
            interrupted.append(prompts)
            raise KeyboardInterrupt
        return generate(self, prompts, sampling, **options)

    monkeypatch.setattr(Engine, "generate", interrupt_once)
    converse(engine, SAMPLING, no_bar, reader("one", "two"))
    assert asked == [("[user]two[assistant]", 7)]


def test_a_model_that_is_not_made_for_it_is_refused_before_it_is_loaded(
    tmp_path, monkeypatch, capsys
):
    save_model(tmp_path, "llama3", vocab_size=260)
    monkeypatch.setattr(Engine, "load", lambda self, bar: pytest.fail("weights were loaded"))
    assert main(["--target", str(tmp_path), "--method", "vanilla", "--chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


@pytest.fixture
def opened(monkeypatch):
    """The engines that conversations were held with."""
    engines = []
    monkeypatch.setattr(
        "easyspec_jax.cli.chat.converse", lambda engine, *_, **options: engines.append(engine)
    )
    return engines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "size"),
    [
        ([], 512 << 20),
        (["--bit-stable"], 0),
        (["--prefix-cache", "0"], 0),
        (["--prefix-cache", "3MB"], 3_000_000),
    ],
)
def test_a_conversation_keeps_prefixes_by_default(directory, opened, flags, size, capsys):
    command = ["--target", str(directory), "--method", "vanilla", "--chat", "--verbose"]
    assert main([*command, *flags]) == 0
    assert [engine.prefix_cache for engine in opened] == [size]
    assert ("prefixes of up to" in capsys.readouterr().err) == bool(size)


@pytest.mark.slow
def test_a_default_store_of_prefixes_gives_way(directory, opened, monkeypatch, capsys):
    """Where memory suffices without it; one that was asked for does not."""
    free = 300 << 20
    monkeypatch.setattr("easyspec_jax.engine.models.free_memory", lambda mesh: free)
    command = ["--target", str(directory), "--method", "vanilla", "--chat"]
    assert main(command) == 0
    assert [engine.prefix_cache for engine in opened] == [0]
    assert main([*command, "--prefix-cache", "512MiB"]) == 2
    error = capsys.readouterr().err
    assert "kept prefixes 0.5" in error
    assert "it would fit with --prefix-cache 0" in error


def test_a_size_that_is_none_is_refused(capsys):
    assert main(["--chat", "--prefix-cache", "1x"]) == 2
    assert "'1x' is not a size such as 700MB or 2GiB" in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_command(directory, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", StringIO("one\n"))
    flags = [
        "--target",
        str(directory),
        "--draft",
        str(directory),
        "--chat",
        "--max-new-tokens",
        "4",
    ]
    assert main(flags) == 0
    output = capsys.readouterr()
    assert output.out.count("\n") == 1
    assert "acceptance rate" in output.err
    assert main([*flags, "--json"]) == 2
    monkeypatch.setattr("sys.stdin", StringIO(""))
    assert main([*flags, "--verbose"]) == 0
    assert "grouped draft layers" in capsys.readouterr().err


def test_a_poisoned_model_is_named_and_its_answer_not_remembered(
    engine, asked, capsys, monkeypatch
):
    generate, told = Engine.generate, []

    def poisoned_once(self, prompts, sampling, **options):
        for completion in generate(self, prompts, sampling, **options):
            told.append(completion)
            yield (
                replace(completion, error="the model is poisoned") if len(told) == 1 else completion
            )

    monkeypatch.setattr(Engine, "generate", poisoned_once)
    converse(engine, SAMPLING, no_bar, reader("one", "two"))
    assert capsys.readouterr().err.count("the model is poisoned") == 1
    assert [text for text, _ in asked] == ["[user]one[assistant]", "[user]two[assistant]"]
