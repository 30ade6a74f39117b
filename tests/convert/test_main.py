"""The command: exit codes, one line for every error, and one line of summary."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from convert.__main__ import main
from easyspec_jax.checkpoint.config import read_model_config
from easyspec_jax.checkpoint.directory import open_checkpoint

ROOT = Path(__file__).parents[2]


def test_gguf_is_converted_with_one_line_of_summary(tiny_model, write_gguf, tmp_path, capsys):
    model = tiny_model(tie_word_embeddings=True)
    arguments = [
        "--gguf",
        write_gguf(model),
        "--out",
        tmp_path / "deep" / "out",
        "--dtype",
        "bfloat16",
    ]
    assert main([str(argument) for argument in arguments]) == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    count = model.num_parameters()
    figures = f"{count / 1e6:.1f} M parameters, bfloat16, {count * 2 / 1e6:.1f} MB"
    assert f"{tmp_path / 'deep' / 'out'}: {figures}" in printed
    assert open_checkpoint(tmp_path / "deep" / "out").config.dtype == "bfloat16"


def test_converted_model_is_exported_with_one_line_of_summary(tiny_model, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "hf")
    assert main(["--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "orbax")]) == 0
    capsys.readouterr()
    assert (
        main(
            [
                "--to-hf",
                str(tmp_path / "orbax"),
                "--out",
                str(tmp_path / "out"),
                "--dtype",
                "float16",
            ]
        )
        == 0
    )
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith(f"{tmp_path / 'out'}: 0.1 M parameters, float16, 0.2 MB")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_rounding_is_summed_up_in_one_line_on_stderr(tiny_model, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "hf")
    capsys.readouterr()  # transformers may have shown a bar
    arguments = ["--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "out"), "--weights", "int8"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert " M parameters, float32, " in printed.out
    assert ", matrices int8" in printed.out
    assert printed.err.startswith("relative rounding errors: embed_tokens 0.")
    assert re.search(r", q_proj 0\.\d\d%, .*; the largest is that of \S+\.weight\n$", printed.err)
    assert printed.err.count("\n") == 1
    assert main(["--to-hf", str(tmp_path / "out"), "--out", str(tmp_path / "back")]) == 0
    assert capsys.readouterr().err == ""
    both = ["--to-hf", str(tmp_path / "out"), "--out", str(tmp_path / "x"), "--weights", "int4"]
    assert main(both) == 2
    message = "--weights int4 is for Orbax checkpoints; a Hugging Face directory holds floats"
    assert message in capsys.readouterr().err


def test_progress_is_shown_on_a_terminal_and_the_summary_elsewhere(tiny_model, tmp_path, terminal):
    model = tiny_model()
    model.save_pretrained(tmp_path / "hf")
    for source, place, out in (("--hf", "hf", "orbax"), ("--to-hf", "orbax", "out")):
        assert main([source, str(tmp_path / place), "--out", str(tmp_path / out)]) == 0
        printed, size = terminal.readouterr(), f"{4 * model.num_parameters() / 1e3:.1f}"
        assert f"{size}/{size} kB" in printed.err
        assert "Converting" in printed.err
        assert printed.out.count("\n") == 1


def test_runs_as_a_module_and_prints_nothing_else(tiny_model, tmp_path):
    tiny_model("qwen2").bfloat16().save_pretrained(
        tmp_path / "hf"
    )  # which NumPy alone does not know
    finished = run("-m", "convert", "--hf", tmp_path / "hf", "--out", tmp_path / "out")
    assert (finished.returncode, finished.stderr, finished.stdout.count("\n")) == (0, "", 1)
    assert read_model_config(tmp_path / "out") == read_model_config(tmp_path / "hf")


def test_help_waits_for_no_heavy_library():
    heavy = {"numpy", "jax", "transformers", "safetensors", "gguf", "tokenizers"}
    finished = run(
        "-c",
        "import sys; from convert.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: "
        f"sys.exit(', '.join({heavy!r} & set(sys.modules)) or 0)",
    )
    assert (finished.returncode, finished.stderr) == (0, "")
    assert "the one that config.json names, or bfloat16" in " ".join(finished.stdout.split())


def test_a_missing_tokenizer_is_said_in_that_line(tiny_model, tmp_path, capsys, tokenizer_metadata):
    from convert.gguf_tokenizer import build_tokenizer

    tiny_model().save_pretrained(tmp_path / "hf")
    assert main(["--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "without")]) == 0
    assert capsys.readouterr().out.endswith(" s; it has no tokenizer, which generating needs\n")
    build_tokenizer(tokenizer_metadata, "tiny").save_pretrained(tmp_path / "hf")
    assert main(["--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "with")]) == 0
    assert capsys.readouterr().out.endswith(" s\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--out", "x"],
        ["--gguf", "x", "--revision", "main", "--out", "z"],
        ["--hf", "x", "--out", "z", "--memory", "much"],
        ["--hf", "x", "--out", "z", "--memory", "2 PB"],
        ["--hf", "x"],
        ["--hf", "x", "--gguf", "y", "--out", "z"],
        ["--hf", "x", "--to-hf", "y", "--out", "z"],
        ["--gguf", "x", "--to-hf", "y", "--out", "z"],
        ["--hf", "x", "--out", "z", "--dtype", "int8"],
    ],
)
def test_bad_arguments_are_one_line(arguments, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("convert: error: ")
    assert printed.err.count("\n") == 1


def test_file_is_no_checkpoint_to_export(tmp_path, capsys):
    (tmp_path / "model.gguf").touch()
    check_error(
        ["--to-hf", tmp_path / "model.gguf", "--out", tmp_path / "out"],
        "model.gguf is not a directory",
        capsys,
    )


@pytest.mark.parametrize("source", ["--hf", "--gguf", "--to-hf"])
def test_missing_source_is_one_line(source, tmp_path, capsys):
    check_error([source, tmp_path / "absent", "--out", tmp_path / "out"], "absent", capsys)
    assert not list(tmp_path.iterdir())


def test_damaged_source_is_one_line(tmp_path, capsys):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\xff")
    check_error(
        ["--gguf", tmp_path / "broken.gguf", "--out", tmp_path / "out"],
        "truncated or damaged",
        capsys,
    )


def test_unusable_destination_is_one_line(tiny_model, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "hf")
    (tmp_path / "file").touch()
    check_error(
        ["--hf", tmp_path / "hf", "--out", tmp_path / "file" / "out"], "cannot be written", capsys
    )
    check_error(["--hf", tmp_path / "hf", "--out", tmp_path / "file"], "already exists", capsys)
    check_error(["--hf", tmp_path / "hf", "--out", tmp_path / "hf"], "already exists", capsys)
    check_error(["--to-hf", tmp_path / "hf", "--out", tmp_path / "hf"], "already exists", capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "hf"}


def test_errors_of_the_system_are_one_line(monkeypatch, tmp_path, capsys):
    def fail(*arguments):
        raise OSError(5, "Input/output error\nof a disk")

    monkeypatch.setattr("convert.huggingface.open_huggingface", fail)
    check_error(
        ["--hf", tmp_path, "--out", tmp_path / "out"], "Input/output error of a disk", capsys
    )


def test_interruption_is_one_line(monkeypatch, tmp_path, capsys):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("convert.huggingface.open_huggingface", interrupt)
    assert main(["--hf", str(tmp_path), "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "convert: interrupted; the same command goes on from here\n"


def check_error(arguments, message, capsys):
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    # Libraries' own lines (a progress bar of the model that was saved) come before ours.
    last = printed.err.splitlines()[-1]
    assert last.startswith("convert: error: ")
    assert message in last


def run(*arguments) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
