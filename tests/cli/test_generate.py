"""The command line is a contract: what it prints, what it refuses, and with which exit code."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from easyspec_jax.cli.generate_flags import generate_parser
from easyspec_jax.cli.sampling_flags import sampling_of
from easyspec_jax.errors import EasySpecError
from easyspec_jax.generate import main
from tests.support.models import LAYERS, add_refit, byte_tokenizer, save_model

STATS = {
    "rounds",
    "drafted",
    "accepted",
    "acceptance_rate",
    "mean_acceptance_length",
    "accepted_per_position",
    "prefill_seconds",
    "decode_seconds",
    "tokens_per_second",
    "lookup_drafted",
    "lookup_accepted",
    "forced",
    "cached_tokens",
    "tiers",
}
SAMPLED = ["--method", "easyspec", "--temperature", "0.8", "--top-k", "50"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny checkpoint whose text never ends by itself, and its transformers model."""
    directory = tmp_path_factory.mktemp("model")
    return directory, save_model(directory, "llama3", vocab_size=260, eos_token_id=3)


@pytest.fixture
def arguments(model):
    return [
        "--target",
        str(model[0]),
        "--draft",
        str(model[0]),
        "--lp-size",
        "3",
        "--max-new-tokens",
        "12",
    ]


def refusal(capsys, *argv: str) -> str:
    """The one line that a refused command leaves on stderr."""
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1, output.err
    assert output.err.startswith("easyspec_jax.generate: error: ")
    return output.err


def test_json_object(model, arguments, capsys):
    assert main([*arguments, "--json", "--prompt", "Hello", "--prompt", "wörld"]) == 0
    output = capsys.readouterr()
    objects = [json.loads(line) for line in output.out.splitlines()]
    assert [o["prompt"] for o in objects] == ["Hello", "wörld"]
    tokenizer = byte_tokenizer()
    for o in objects:
        assert set(o) == {"prompt", "prompt_ids", "token_ids", "text", "finish_reason", "stats"}
        assert set(o["stats"]) == STATS
        assert o["prompt_ids"] == tokenizer(o["prompt"]).input_ids
        expected = model[1].generate(
            torch.tensor([o["prompt_ids"]]), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert o["token_ids"] == expected[0, len(o["prompt_ids"]) :].tolist()
        assert o["text"] == tokenizer.decode(o["token_ids"], skip_special_tokens=True)
        assert o["finish_reason"] == ("stop" if o["token_ids"][-1] == 3 else "length")
        stats = o["stats"]
        assert len(stats["accepted_per_position"]) == 5
        assert (
            sum(stats["accepted_per_position"])
            == stats["accepted"]
            <= stats["drafted"]
            <= 5 * stats["rounds"]
        )
        assert stats["acceptance_rate"] == stats["accepted"] / stats["drafted"]
        assert stats["mean_acceptance_length"] == 1 + stats["accepted"] / stats["rounds"]


@pytest.mark.parametrize("streaming", [[], ["--no-stream"]])
def test_text_on_stdout_and_one_summary_line_on_stderr(arguments, capsys, streaming):
    assert main([*arguments, "--json", "--prompt", "Hello"]) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert main([*arguments, *streaming, "--prompt", "Hello"]) == 0
    output = capsys.readouterr()
    assert output.out == text + "\n"
    assert output.err.count("\n") == 1
    for part in ("12 tokens", "tokens/s", "acceptance rate", "easyspec on layer=1,tensor=1"):
        assert part in output.err


def test_prompt_file(arguments, capsys, tmp_path):
    (tmp_path / "prompts.txt").write_bytes("\ufefffirst\n\nsec\u2028ond\r\n".encode())
    assert (
        main(
            [
                *arguments,
                "--method",
                "vanilla",
                "--json",
                "--prompt-file",
                str(tmp_path / "prompts.txt"),
            ]
        )
        == 0
    )
    assert [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()] == [
        "first",
        "sec\u2028ond",
    ]


@pytest.mark.slow
def test_seed_makes_sampling_repeatable(arguments, capsys):
    def text(seed: str) -> str:
        assert (
            main([*arguments, "--no-stream", "--temperature", "1", "--seed", seed, "--prompt", "a"])
            == 0
        )
        return capsys.readouterr().out

    assert text("1") == text("1") != text("2")


@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ["--method", "sd", "--tree-width", "4"],
            "--method sd grows no trees: leave out --tree-width",
        ),
        (["--tree-width", "65"], "--tree-width 65 must be from 1 to 64"),
        (
            ["--tree-width", "4", "--tree-nodes", "21"],
            "--tree-nodes 21 must be from 5 to 20: one node a level",
        ),
        (["--verifier", "other"], "invalid choice: 'other'"),
        (["--top-k", "-1"], "--top-k -1 must be from 0 to 2147483647 ids (0: all)"),
        (["--top-p", "0"], "--top-p 0.0 must be a probability"),
        (["--top-p", "nan"], "--top-p nan must be a probability"),
        (["--temperature", "-1"], "--temperature -1.0 must be"),
        (["--temperature", "nan"], "--temperature nan must be"),
        (["--seed", "-1"], "--seed -1 must be"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0 must be at least 1"),
        (["--num-speculative-tokens", "17"], "--num-speculative-tokens 17 must be from 1 to 16"),
        (["--kv-dtype", "int4"], "invalid choice: 'int4'"),
        (["--lp-size", "0"], "--lp-size 0 must be at least 1"),
        (["--lp-size", "many"], "invalid int value: 'many'"),
        (["--mesh", "0"], "--mesh '0' is neither"),
        (["--mesh", "layer=2"], "--mesh 'layer=2' is neither"),
        (["--mesh", "99999"], "--mesh asks for 99999 devices but there are 8"),
        (["--temperature", "1e-40"], "--temperature 1e-40 must be"),
        (["--mesh", "9"], "--mesh asks for 9 devices but there are 8"),
        (["--platform", "gpu"], "--platform gpu: JAX finds no such device"),
        (["--lp-strategy", "0,1-3,3,4,5"], "names layer 3 twice"),
        (
            ["--lp-strategy", f"0,1-{LAYERS}"],
            f"names layer {LAYERS}; the draft has 0 to {LAYERS - 1}",
        ),
        (["--lp-strategy", "0,2-5"], "leaves out layer 1"),
        (["--max-length", "6"], "leaves no room within --max-length 6 (by default what both mod"),
        (["--max-length", "6"], "made for); shorten it, or give a larger one, up to 1024"),
        (["--max-length", "1000000"], "--max-length 1000000 must be from 2 to"),
        (["--chat"], "no chat template"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["--stop", ""], "--stop '' would end every text"),
        (["--unknown"], "unrecognized arguments: --unknown"),
        (["--min-p", "1.5"], "--min-p 1.5 must be a probability from 0 (all) to 1"),
        (["--confidence-threshold", "low"], "'low' is neither a number nor auto"),
        (["--logit-bias", "7"], "'7' is not ID:BIAS, such as 50256:-100"),
        (["--logit-bias", "7:101"], "--logit-bias 101.0 of id 7 must be from -100 to 100"),
        (["--logit-bias", "999999:1"], "--logit-bias names id 999999, and the target has ids"),
        (["--stop-token-ids", "-1"], "--stop-token-ids -1 must be at least 0"),
        (["--stop-token-ids", *map(str, range(65))], "lists 65 ids; the most is 64"),
        (
            ["--min-new-tokens", "9", "--max-new-tokens", "5"],
            "--min-new-tokens 9 must be from 0 to 5: the most is --max-new-tokens",
        ),
        (["--presence-penalty", "2.5"], "--presence-penalty 2.5 must be from -2 to 2"),
        (["--repetition-penalty", "0"], "--repetition-penalty 0.0 must be from 0.01 to 100"),
        (["--logprobs", "21", "--json"], "--logprobs 21 must be from 0 to 20"),
        (["--logprobs", "2"], "--logprobs needs --json or --prompts FILE"),
        (["--n", "2"], "--n 2 texts would be equal at --temperature 0"),
        (["--bad-words", " "], "--bad-words takes several texts, each of more than blanks"),
        (["--bad-words", *["ab"] * 1025], "--bad-words are 1025 sequences of tokens"),
    ],
    ids=lambda value: (
        value[0] + (value[1] if len(value) > 1 else "") if isinstance(value, list) else ""
    ),
)
def test_bad_flags_are_one_clear_line(arguments, capsys, flags, words):
    assert words in refusal(capsys, *arguments, *flags, "--prompt", "some text")


def test_bad_prompts_are_one_clear_line(arguments, capsys, tmp_path):
    assert "the prompt is empty" in refusal(capsys, *arguments, "--prompt", "fine", "--prompt", "")
    assert "no prompt" in refusal(capsys, *arguments)
    assert "not valid Unicode" in refusal(capsys, *arguments, "--prompt", "\udcff")
    refused = refusal(capsys, *arguments, "--prompt", "long" * 1000)
    assert "leaves no room within --max-length 1024" in refused
    assert refused.rstrip().endswith("shorten it")
    assert "cannot be read" in refusal(
        capsys, *arguments, "--prompt-file", str(tmp_path / "absent")
    )
    (tmp_path / "blank").write_text("\n\n", encoding="utf-8")
    assert "holds no prompt" in refusal(
        capsys, *arguments, "--prompt-file", str(tmp_path / "blank")
    )


def test_bad_grammars_are_one_clear_line(arguments, capsys, tmp_path):
    pytest.importorskip("llguidance")
    prompt = ["--prompt", "text"]
    absent, latin, broken = (str(tmp_path / name) for name in ("absent", "latin", "broken"))
    Path(latin).write_bytes(b'{"title": "\xe9"}')
    Path(broken).write_text('{"type": ', encoding="utf-8")
    neither = "is neither a schema nor a file that can be read"
    for given in (absent, latin, str(tmp_path), "x\0", "x" * 5000):
        assert neither in refusal(capsys, *arguments, "--json-schema", given, *prompt)
    assert "--json-schema is not JSON" in refusal(
        capsys, *arguments, "--json-schema", broken, *prompt
    )
    invalid = "--json-schema cannot be used: Invalid type: strin"
    assert invalid in refusal(capsys, *arguments, "--json-schema", '{"type": "strin"}', *prompt)
    assert "--choice takes several texts" in refusal(capsys, *arguments, "--choice", "", *prompt)
    assert "--regex cannot be used: unclosed group" in refusal(
        capsys, *arguments, "--regex", "(", *prompt
    )
    assert "--regex and --choice exclude each other" in refusal(
        capsys, *arguments, "--regex", "a", "--choice", "a", *prompt
    )


def test_a_conversation_has_one_answer(arguments, capsys):
    flags = ["--chat", "--n", "2", "--temperature", "1"]
    assert "one answer a turn: leave out --n" in refusal(capsys, *arguments, *flags)


def test_bad_checkpoints_are_one_clear_line(model, arguments, capsys, tmp_path):
    directory = str(model[0])
    prompt = ["--prompt", "text"]
    assert "--draft needs --target DIR" in refusal(capsys, "--draft", directory, *prompt)
    assert "needs --draft DIR" in refusal(capsys, "--target", directory, *prompt)
    assert "is not a directory" in refusal(capsys, "--target", str(tmp_path / "absent"), *prompt)
    refusal(capsys, "--target", "x" * 5000, *prompt)

    save_model(tmp_path / "other", "smollm2", vocab_size=260)
    words = Tokenizer(models.WordLevel({f"word{number}": number for number in range(260)}, "word0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "other")
    other = ["--target", directory, "--draft", str(tmp_path / "other"), *prompt]
    assert "have 0 tokens in common" in refusal(capsys, *other)

    weights = tmp_path / "other" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "truncated" in refusal(capsys, *other)
    weights.unlink()
    assert "holds no weights" in refusal(capsys, *other)

    config = json.loads((model[0] / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))
    assert "model_type 'gpt_neox' is not supported" in refusal(capsys, *other)


def test_nothing_is_loaded_before_everything_is_checked(arguments, capsys, monkeypatch):
    from easyspec_jax.engine.engine import Engine

    monkeypatch.setattr(Engine, "load", lambda self, bar: pytest.fail("weights were loaded"))
    refusal(capsys, *arguments, "--prompt", "fine", "--prompt", "")


@pytest.mark.parametrize(
    ("fault", "code", "lines"),
    [
        (KeyboardInterrupt(), 130, ["\n"]),
        (BrokenPipeError(), 0, [""]),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
            2,
            ["memory does not suffice", "--max-new-tokens"],
        ),
        (OSError(5, "Input/output error"), 2, ["Input/output error"]),
    ],
    ids=["interrupted", "reader gone", "out of memory", "output broken"],
)
def test_how_it_ends_when_it_cannot_go_on(arguments, capsys, monkeypatch, fault, code, lines):
    from easyspec_jax.engine.engine import Engine

    def fail(self, bar):
        raise fault

    monkeypatch.setattr(Engine, "load", fail)
    assert main([*arguments, "--prompt", "a"]) == code
    err = capsys.readouterr().err
    assert err.count("\n") <= 1
    assert all(line in err for line in lines)


@pytest.mark.slow
def test_as_a_program(model):
    """With the virtual devices that the command makes itself, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "easyspec_jax.generate",
        "--platform",
        "cpu",
        "--mesh",
        "8",
        "--json",
    ]
    command += [
        "--target",
        str(model[0]),
        "--draft",
        str(model[0]),
        "--prompt",
        "Hi",
        "--max-new-tokens",
        "3",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert len(json.loads(run.stdout)["token_ids"]) == 3
    failed = subprocess.run([*command, "--seed", "x"], capture_output=True, text=True, check=False)
    assert (failed.returncode, failed.stdout, failed.stderr.count("\n")) == (2, "", 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_one_line(model):
    command = [
        sys.executable,
        "-m",
        "easyspec_jax.generate",
        "--target",
        str(model[0]),
        "--method",
        "vanilla",
        "--json",
    ]
    with open("/dev/full", "w") as full:
        run = subprocess.run(
            [*command, "--prompt", "a"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1, run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("sampling", [[], ["--temperature", "0.8"]], ids=["greedy", "sampled"])
def test_narrow_types_with_a_replicated_draft(arguments, capsys, dtype, sampling):
    """Strict promotion is on: an operand that is silently widened raises."""
    flags = [
        "--dtype",
        dtype,
        "--mesh",
        "4",
        "--draft-tensor-parallel-size",
        "1",
        "--json",
        "--prompt",
        "a",
    ]
    assert main([*arguments, *flags, *sampling]) == 0
    output = json.loads(capsys.readouterr().out)
    assert len(output["token_ids"]) == 12
    assert output["stats"]["acceptance_rate"] > 0.2


def test_five_lines_of_python(model):
    """The README's example."""
    from easyspec_jax import EasySpecError, SamplingParams, open_model

    engine = open_model(target=model[0], draft=model[0], mesh="8")
    for completion in engine.generate(["Once upon a time"], SamplingParams(max_new_tokens=8)):
        assert len(completion.token_ids) == 8
        assert np.isfinite(completion.stats.tokens_per_second)
    with pytest.raises(EasySpecError, match="a list of prompts"):
        engine.generate("one string")
    with pytest.raises(EasySpecError, match="must be at least 1"):
        engine.generate(["a"], batch_size=0)


@pytest.mark.slow
def test_a_stop_string_ends_the_text_the_same_way_for_every_method(
    model, arguments, capsys, tmp_path
):
    """And what lies past it counts neither as drafted nor as accepted."""

    def output(*flags: str):
        assert main([*arguments, "--json", "--prompt", "Hello", *flags]) == 0
        return json.loads(capsys.readouterr().out)

    whole = output()
    text = whole["text"]
    stop = text[5:7]
    plain = output("--stop", stop, "--stop", "never there", "--method", "vanilla")
    assert plain["text"] == text[: text.index(stop)]
    assert plain["finish_reason"] == "stop"
    assert len(plain["token_ids"]) < len(whole["token_ids"])
    assert plain["token_ids"] == whole["token_ids"][: len(plain["token_ids"])]
    refit = add_refit(model[0], 3, tmp_path)
    for flags in (["--method", "sd"], [], ["--refit", refit]):
        cut = output("--stop", stop, *flags)
        assert (cut["text"], cut["token_ids"]) == (plain["text"], plain["token_ids"])
        stats = cut["stats"]
        assert stats["accepted"] <= stats["drafted"]
        assert (
            stats["accepted"] + stats["rounds"]
            <= whole["stats"]["accepted"] + whole["stats"]["rounds"]
        )
        assert stats["accepted"] <= len(cut["token_ids"]) - 1
    assert main([*arguments, "--prompt", "Hello", "--stop", stop]) == 0
    assert capsys.readouterr().out == plain["text"] + "\n"


def test_lists_may_be_given_in_parts(arguments):
    flags = ["--bad-words", "a", "--bad-words", "b", "c", "--stop-token-ids", "3"]
    flags += ["--stop-token-ids", "4", "--logit-bias", "5:1", "--logit-bias", "6:2"]
    found = sampling_of(generate_parser("test", "").parse_args([*arguments, *flags]))
    assert found.bad_words == ("a", "b", "c") and found.stop_token_ids == (3, 4)
    assert dict(found.logit_bias) == {5: 1.0, 6: 2.0}


def test_escapes_in_a_stop_string(arguments):
    def stop(*texts):
        flags = [word for text in texts for word in ("--stop", text)]
        return sampling_of(generate_parser("test", "").parse_args([*arguments, *flags])).stop

    assert stop(r"\n", r"a\tb", r"\\n", r"\d", "\n") == ("\n", "a\tb", r"\n", r"\d", "\n")


def test_prompts_out_of_standard_input(arguments, capsys, monkeypatch):
    for content, code in ((b"one\n\ntwo\r\n", 0), (b"\n", 2), (b"\xff", 2)):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        assert main([*arguments, "--json", "--prompt-file", "-"]) == code
        printed = [json.loads(line)["prompt"] for line in capsys.readouterr().out.splitlines()]
        assert printed == (["one", "two"] if code == 0 else [])


def test_a_system_message_goes_before_every_prompt(model, arguments, capsys, tmp_path):
    shutil.copytree(model[0], tmp_path / "model")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    flags = [
        "--target",
        str(tmp_path / "model"),
        "--method",
        "vanilla",
        "--json",
        "--max-new-tokens",
        "2",
    ]
    assert main([*flags, "--chat", "--system", "be brief", "--prompt", "one"]) == 0
    (printed,) = capsys.readouterr().out.splitlines()
    assert byte_tokenizer().decode(json.loads(printed)["prompt_ids"]) == "[system]be brief[user]one"
    assert "--system needs --chat" in refusal(
        capsys, *flags, "--system", "be brief", "--prompt", "one"
    )


def test_files_on_another_disk(model, arguments, capsys, tmp_path):
    directory = tmp_path / "model"
    shutil.copytree(model[0], directory)
    (directory / "model.safetensors").rename(tmp_path / "elsewhere")
    (directory / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    flags = [
        "--target",
        str(directory),
        "--method",
        "vanilla",
        "--max-new-tokens",
        "2",
        "--prompt",
        "a",
    ]
    assert "--allow-links" in refusal(capsys, *flags)
    assert main([*flags, "--allow-links"]) == 0


def test_a_text_ends_where_the_template_ends_a_turn(model, arguments, capsys, tmp_path):
    """The stop ids are those of a base model, and the token that ends turns is not among them."""
    assert main([*arguments, "--json", "--prompt", "Hello"]) == 0
    (plain,) = map(json.loads, capsys.readouterr().out.splitlines())
    tokenizer = byte_tokenizer()
    ends = str(tokenizer.convert_ids_to_tokens(plain["token_ids"][4]))
    directory = tmp_path / "model"
    shutil.copytree(model[0], directory)
    tokenizer.backend_tokenizer.add_tokens(
        [AddedToken(ends, normalized=False)]
    )  # one that is not hidden
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}" + ends + "{% endfor %}"
    tokenizer.save_pretrained(directory)
    assert main([*arguments, "--target", str(directory), "--json", "--prompt", "Hello"]) == 0
    (printed,) = map(json.loads, capsys.readouterr().out.splitlines())
    count = plain["token_ids"].index(plain["token_ids"][4]) + 1
    assert printed["token_ids"] == plain["token_ids"][:count]
    assert printed["finish_reason"] == "stop"
    assert printed["text"] == byte_tokenizer().decode(printed["token_ids"][:-1])


@pytest.mark.slow
def test_compare_decodes_the_same_prompts_plainly(arguments, capsys):
    prompts = ["--prompt", "Hello", "--prompt", "wörld"]
    assert main([*arguments, "--compare", "--json", *prompts]) == 0
    for line in capsys.readouterr().out.splitlines():
        o = json.loads(line)
        assert o["plain"]["same_tokens"] is True
        assert o["plain"]["stats"]["rounds"] == len(o["token_ids"]) - 1
        assert set(o["plain"]["stats"]) == STATS
        assert (
            o["plain"]["speedup"]
            == o["stats"]["tokens_per_second"] / o["plain"]["stats"]["tokens_per_second"]
        )
    assert main([*arguments, "--compare", *prompts]) == 0
    output = capsys.readouterr()
    table = output.err.splitlines()
    assert len(table) == 4
    assert "same tokens for 2 of 2 prompts" in table[3]
    assert "× plain decoding" in table[3]
    assert [line.split()[0] for line in table[1:3]] == ["easyspec", "vanilla"]


def test_verbose_shows_which_layers_live_where(arguments, capsys):
    assert (
        main([*arguments, "--verbose", "--mesh", "layer=3,tensor=2", "--json", "--prompt", "a"])
        == 0
    )
    output = capsys.readouterr()
    assert json.loads(output.out)["text"]
    heading, times, columns, *rows = output.err.splitlines()
    assert "layer=3,tensor=2 of virtual CPU devices" in heading
    assert "groups 0,1-2,3-4,5" in heading
    assert re.fullmatch(r"loaded in \d+\.\d\d s · compiled in \d+\.\d\d s", times)
    assert "KV of 128 tokens" in columns
    assert [row.split()[1:3] for row in rows] == [["1", "3"]] * 2 + [["2", "4"]] * 2 + [
        ["–", rows[5].split()[2]]
    ] * 2
    assert all(row.count("MiB") == 3 for row in rows)
    sizes = float(rows[0].split()[-2])
    flags = ["--verbose", "--mesh", "layer=3,tensor=2", "--json", "--prompt", "a", "--prompt", "b"]
    assert main([*arguments, *flags, "--batch-size", "2"]) == 0
    _, _, columns, *rows = capsys.readouterr().err.splitlines()
    assert "KV of 2 × 128 tokens" in columns
    assert float(rows[0].split()[-2]) == pytest.approx(2 * sizes, abs=0.1)


@pytest.mark.slow
def test_int8_caches(arguments, capsys):
    """The same command with and without a draft gives one text, and --verbose names the caches."""
    texts = []
    for method in ("easyspec", "vanilla"):
        options = ["--kv-dtype", "int8", "--method", method, "--verbose", "--json"]
        assert main([*arguments, *options, "--prompt", "a prompt"]) == 0
        output = capsys.readouterr()
        texts.append(json.loads(output.out)["text"])
        assert "· float32, caches int8 ·" in output.err
    assert texts[0] == texts[1]


def test_progress_and_text_share_a_terminal(arguments, terminal):
    assert main([*arguments, "--no-stream", "--compare", "--prompt", "a", "--prompt", "b"]) == 0
    output = terminal.readouterr()
    for bar in ("Loading target", "Generating", "Decoding plainly"):
        assert bar in output.err
    assert main([*arguments, "--json", "--prompt", "a"]) == 0
    assert terminal.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "vanilla"],
        pytest.param(SAMPLED, marks=pytest.mark.exhaustive),
        pytest.param([*SAMPLED, "--refit"], marks=pytest.mark.exhaustive),
    ],
    ids=["plain", "sampled", "refit"],
)
def test_a_batch_changes_no_text(model, arguments, capsys, tmp_path, flags):
    """Prompts of different lengths, one ending early, alone and in batches of 3, the last short."""
    prompts = ["a", "b" * 150, "Hello", "wörld", "x y z"]
    refit = [add_refit(model[0], 3, tmp_path)] if flags[-1] == "--refit" else []
    flags = [*flags, *refit, *(flag for prompt in prompts for flag in ("--prompt", prompt))]

    def objects(batch_size):
        assert main([*arguments, *flags, "--json", "--batch-size", batch_size]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    alone = objects("1")
    assert [o["prompt"] for o in alone] == prompts
    flags += ["--stop", alone[2]["text"][3:5]]
    alone = objects("1")
    assert len({len(o["token_ids"]) for o in alone}) > 1
    for one, together in zip(alone, objects("3"), strict=True):
        for key in ("prompt", "token_ids", "text", "finish_reason"):
            assert one[key] == together[key]
        for key in ("rounds", "drafted", "accepted"):
            assert one["stats"][key] == together["stats"][key]


@pytest.mark.slow
def test_a_batch_is_printed_in_order_and_timed_once(arguments, capsys):
    flags = ["--prompt", "Hello", "--prompt", "b"]
    assert main([*arguments, *flags, "--no-stream"]) == 0
    texts = capsys.readouterr().out
    assert main([*arguments, *flags, "--batch-size", "2"]) == 0
    output = capsys.readouterr()
    assert output.out == texts
    assert "24 tokens" in output.err


def test_hosts_compare_the_contents_of_files(tmp_path, monkeypatch):
    """Not their names, which may be the same for other contents."""
    commands = []

    def noted(program: str, peer: Any, command: Any, wording: Any) -> Any:
        commands.append(command)
        raise EasySpecError("noted")

    monkeypatch.setattr("easyspec_jax.cli.generate.hosts.joined", noted)
    files = {"a": '{"type": "object"}', "b": '{"type": "object"}', "c": '{"type": "array"}'}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for flag in ("--json-schema", "--prompt-lookup-corpus"):
        method = ["--method", "ngram"] if flag == "--prompt-lookup-corpus" else []
        for name in files:
            words = ["--mesh", "2", "--distributed", "--coordinator", "127.0.0.1:9"]
            words += ["--num-processes", "2", "--process-id", "0", "--prompt", "a", *method]
            assert main([*words, flag, str(tmp_path / name)]) == 2
        first, same, other = commands[-3:]
        assert first == same != other
