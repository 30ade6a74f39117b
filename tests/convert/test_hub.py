"""Downloads contain nothing that is unpickled or run; a failed one gives one clear line."""

from pathlib import Path

import huggingface_hub
import pytest

from convert.__main__ import main
from convert.hub import directory_of
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.errors import EasySpecError

REVISION = "0123456789abcdef0123456789abcdef01234567"


def test_an_id_is_fetched_at_its_revision(tiny_model, tmp_path, monkeypatch, capsys):
    asked = []

    def download(repository, *, revision, allow_patterns):
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path / "cache")

    tiny_model("mistral", sliding_window=None).save_pretrained(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    arguments = ["--hf", "some/model", "--revision", REVISION, "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    ((repository, revision, patterns),) = asked
    assert (repository, revision) == ("some/model", REVISION)
    assert "model*.safetensors" in patterns
    assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".py", ".pt"))]
    assert open_checkpoint(tmp_path / "out").config.model_type == "mistral"


@pytest.mark.parametrize(
    "error", [OSError("offline\nand more"), ValueError("no such revision"), RuntimeError()]
)
def test_what_cannot_be_fetched_is_one_line(tmp_path, monkeypatch, capsys, error):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert main(["--hf", "some/model", "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(
        "convert: error: some/model is not a local directory and cannot be fetched from the hub ("
    )
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_library_itself_is_quoted_when_it_is_offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        EasySpecError, match=r"^some/model is not a local directory and cannot be fetched"
    ) as error:
        directory_of("some/model")
    assert "\n" not in str(error.value)


def test_directories_stay_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("some/model").mkdir(parents=True)
    for source in ("some/model", str(tmp_path), "/absent", "absent", "a/b/c"):
        assert directory_of(source) == Path(source)
    with pytest.raises(EasySpecError, match=r"`revision` needs a model on the hub"):
        directory_of("some/model", REVISION)
