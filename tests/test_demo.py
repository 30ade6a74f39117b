"""The bundled pair matches its model card, and is the default of the command."""

import json
import os
import subprocess
import sys

import jax
import pytest

from easyspec_jax import demo
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.generate import main
from easyspec_jax.tokenizer import load_tokenizer

FOLDER = demo.TARGET.parent


def size(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def test_the_pair_is_small_and_the_draft_much_smaller_and_deep():
    assert size(FOLDER) <= 20e6
    weights = [(path / "model.safetensors").stat().st_size for path in (demo.TARGET, demo.DRAFT)]
    assert weights[0] >= 8 * weights[1]
    target, draft = (open_checkpoint(path).config for path in (demo.TARGET, demo.DRAFT))
    assert draft.num_hidden_layers >= 12
    assert target.dtype == draft.dtype == "bfloat16"
    assert load_tokenizer(demo.TARGET).get_vocab() == load_tokenizer(demo.DRAFT).get_vocab()


def test_the_model_card_has_the_figures_of_the_training():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    figures = json.loads((FOLDER / "training.json").read_text())
    for name in ("target", "draft"):
        assert f"{figures[name]['heldout_bits_per_byte']:.3f}" in card
        assert f"{figures[name]['loss']:.3f}" in card
        assert f"{figures[name]['steps']:,}" in card


@pytest.mark.slow
def test_nothing_but_the_command(capsys):
    """The README's first command gives the text of plain decoding, and accepts most drafts."""
    assert main(["--mesh", "8", "--compare", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["prompt"] == demo.PROMPT
    assert printed["plain"]["same_tokens"] is True
    assert printed["stats"]["acceptance_rate"] > 0.55
    assert "return" in printed["text"]


def test_on_one_accelerator_the_pair_falls_back_to_virtual_devices_and_says_so(capsys, monkeypatch):
    devices = jax.devices
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(
        jax, "devices", lambda platform=None: devices("cpu")[: None if platform else 1]
    )
    assert main(["--mesh", "2", "--method", "vanilla", "--json", "--max-new-tokens", "2"]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "virtual CPU devices" in line
    assert "--mesh 1 uses the gpu" in line
    assert (
        main(["--target", str(demo.TARGET), "--mesh", "2", "--method", "vanilla", "--prompt", "a"])
        == 2
    )
    assert "use --mesh 1" in capsys.readouterr().err


@pytest.mark.slow
def test_in_an_empty_directory(tmp_path):
    command = [
        sys.executable,
        "-m",
        "easyspec_jax.generate",
        "--max-new-tokens",
        "4",
        "--platform",
        "cpu",
    ]
    run = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parents[1])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip()
    assert run.stderr.startswith(demo.PROMPT)
    assert "acceptance rate" in run.stderr
    assert not list(tmp_path.iterdir())
