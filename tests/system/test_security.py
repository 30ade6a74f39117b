"""Hostile checkpoints: none of their code runs, no file outside is read, no size is believed."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.__main__ import main as convert
from convert.gguf import open_gguf
from easyspec_jax.checkpoint import config, safetensors
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.orbax import WEIGHTS, OrbaxSource
from easyspec_jax.checkpoint.safetensors import INDEX, SAFETENSORS
from easyspec_jax.errors import EasySpecError
from easyspec_jax.tokenizer import conversation, encode, load_tokenizer, loading
from tests.checkpoint.test_directory import write_converted, write_huggingface, write_orbax
from tests.support.models import byte_tokenizer


@pytest.fixture
def secret(tmp_path) -> Path:
    path = tmp_path / "secret"
    path.write_text("nobody's business")
    return path


@pytest.fixture
def planted(tmp_path) -> Path:
    """A complete checkpoint, not yet hostile."""
    directory = tmp_path / "planted"
    directory.mkdir()
    write_huggingface(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_tokenizer_is_never_imported(planted, tmp_path, known):
    ran = tmp_path / "ran"
    (planted / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    for name in ("vocab.pkl", "tokenizer.pkl", "pytorch_model.bin"):  # what unpickling would run
        (planted / name).write_bytes(b"cos\nmkdir\n(S'" + os.fsencode(ran) + b"'\ntR.")
    edit(
        planted / "config.json", auto_map={"AutoTokenizer": "evil.Evil", "AutoConfig": "evil.Evil"}
    )
    map_ = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
    edit(
        planted / "tokenizer_config.json", **map_, **({} if known else {"tokenizer_class": "Evil"})
    )
    try:
        assert encode(load_tokenizer(planted), "ab")
    except EasySpecError as error:
        assert "\n" not in str(error)
    open_checkpoint(planted)
    assert not ran.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set _ = messages.append(1) %}",
        "{% include 'config.json' %}",
        "{% import 'os' as os %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
    ],
)
def test_templates_stay_in_their_sandbox(template):
    hostile = byte_tokenizer()
    hostile.chat_template = template
    with pytest.raises(EasySpecError, match="chat template fails"):
        encode(hostile, "hello", chat=True)


def test_templates_end(monkeypatch):
    monkeypatch.setattr(conversation, "_RENDERING", 0.1)
    hostile = byte_tokenizer()
    hostile.chat_template = (
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    )
    with pytest.raises(EasySpecError, match=r"it takes longer than 0\.1 s"):
        encode(hostile, "hello", chat=True)
    monkeypatch.undo()
    hostile.chat_template = "{{ 'a' * 20000000 }}"
    with pytest.raises(EasySpecError, match="it makes 20000000 characters"):
        encode(hostile, "hello", chat=True)


@pytest.mark.parametrize("name", ["config.json", SAFETENSORS, "tokenizer.json", "tokenizer_more"])
@pytest.mark.parametrize("relative", [True, False])
def test_links_do_not_lead_out(planted, secret, tmp_path, capsys, name, relative):
    """A conversion copies a tokenizer's files, and the copy may be given to others."""
    (planted / name).unlink(missing_ok=True)
    (planted / name).symlink_to(Path("..", secret.name) if relative else secret)
    with pytest.raises(
        EasySpecError, match=f"{name} is a link that points outside the checkpoint directory"
    ):
        open_checkpoint(planted)
    assert convert(["--hf", str(planted), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()


def test_links_within_and_those_of_the_hub_are_followed(planted, tmp_path):
    (planted / "weights.real").mkdir()
    (planted / SAFETENSORS).rename(planted / "weights.real" / "a")
    (planted / SAFETENSORS).symlink_to("weights.real/a")
    open_checkpoint(planted)
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "1234",
        tmp_path / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_huggingface(snapshot)
    for path in list(snapshot.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(Path("../../blobs", path.name))
    open_checkpoint(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    open_checkpoint(tmp_path / "link")


def test_links_that_lead_out_are_followed_where_the_user_says_so(planted, tmp_path, capsys):
    (planted / SAFETENSORS).rename(tmp_path / "elsewhere")
    (planted / SAFETENSORS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        EasySpecError,
        match="put the file itself there, or give `allow_links`",
    ):
        open_checkpoint(planted)
    assert open_checkpoint(planted, allow_links=True).source.shapes()
    command = ["--hf", str(planted), "--out", str(tmp_path / "out")]
    assert convert(command) == 2
    assert convert([*command, "--allow-links"]) == 0
    assert open_checkpoint(tmp_path / "out").source.shapes()


def test_templates_do_not_lead_out_either(planted, secret):
    (planted / "additional_chat_templates").mkdir()
    (planted / "additional_chat_templates" / "tool_use.jinja").symlink_to(secret)
    with pytest.raises(EasySpecError, match="points outside the checkpoint directory"):
        open_checkpoint(planted)


def test_a_pipe_is_no_file(planted):
    (planted / "config.json").unlink()
    os.mkfifo(planted / "config.json")
    with pytest.raises(EasySpecError, match=r"config\.json is not a regular file"):
        open_checkpoint(planted)


def orbax_leaf(name: str) -> dict[str, Any]:
    """The tensors of an Orbax checkpoint, as its metadata lists them: one of this name."""
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    return {
        str((name,)): {
            "key_metadata": [{"key": name, "key_type": 2}],
            "value_metadata": value,
        }
    }


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret"])
def test_names_of_orbax_tensors_stay_in_its_store(tmp_path, name, secret):
    write_converted(tmp_path)
    metadata = tmp_path / WEIGHTS / "_METADATA"
    edit(metadata, tree_metadata=orbax_leaf(name))
    with pytest.raises(EasySpecError, match="is not a readable Orbax checkpoint") as error:
        open_checkpoint(tmp_path)
    assert "NOT_FOUND" in str(error.value) or "INVALID_ARGUMENT" in str(error.value)


def test_links_in_an_orbax_store(tmp_path, secret):
    store = tmp_path / "store"
    store.mkdir()
    write_converted(store)
    (store / WEIGHTS / "manifest.ocdbt").unlink()
    (store / WEIGHTS / "manifest.ocdbt").symlink_to(secret)
    with pytest.raises(EasySpecError, match="points outside the checkpoint directory"):
        open_checkpoint(store)


def test_an_orbax_store_that_claims_more_than_it_has(tmp_path):
    import tensorstore as ts

    write_orbax(tmp_path, {"w": np.ones((4, 4), np.float32)})
    weights = tmp_path / WEIGHTS
    edit(weights / "_METADATA", tree_metadata=orbax_leaf("big"))
    for shape, chunk, complaint in (
        ([1 << 20, 1 << 20], [1024, 1024], "bytes of tensors cannot lie in files of"),
        ([4, 4], [64, 64], "are larger than their tensor"),
    ):
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "ocdbt", "base": weights.as_uri() + "/", "path": "big/"},
            "metadata": {
                "shape": shape,
                "data_type": "float32",
                "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
            },
        }
        ts.open(spec, create=True, delete_existing=True).result()
        with pytest.raises(EasySpecError, match=complaint):
            OrbaxSource(weights)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_json_beyond_all_measure(planted, monkeypatch, name):
    monkeypatch.setattr(config, "LARGEST_JSON", 4096)
    if name == INDEX:  # which is not read next to a single file
        (planted / SAFETENSORS).unlink()
    (planted / name).write_text("[" * 5000)
    with pytest.raises(
        EasySpecError, match=f"{name} is larger than 0 MiB, the limit for JSON files"
    ):
        open_checkpoint(planted)


def test_a_header_beyond_all_measure(planted, monkeypatch):
    """A length is checked before the entry is read, against what the file can hold."""
    monkeypatch.setattr(safetensors, "LARGEST_JSON", 100)
    with pytest.raises(EasySpecError, match="its header does not fit"):
        open_checkpoint(planted)
    monkeypatch.undo()
    (planted / SAFETENSORS).write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(EasySpecError, match="its header does not fit"):
        open_checkpoint(planted)


def test_shapes_that_the_file_cannot_hold(planted):
    edit(
        planted / "config.json",
        hidden_size=2**20,
        num_attention_heads=2**10,
        intermediate_size=2**30,
    )
    with pytest.raises(EasySpecError, match="do not match the configuration"):
        open_checkpoint(planted)
    save_file({"w": np.zeros(1, np.float32)}, planted / SAFETENSORS)
    content = (planted / SAFETENSORS).read_bytes().replace(b'"shape":[1]', b'"shape":[9]')
    (planted / SAFETENSORS).write_bytes(content)
    with pytest.raises(EasySpecError, match="the size of 'w' does not match its shape"):
        open_checkpoint(planted)


def test_a_tokenizer_beyond_all_measure(planted):
    os.truncate(planted / "tokenizer.json", loading.LARGEST_FILE + 1)  # a sparse file
    with pytest.raises(
        EasySpecError,
        match=r"tokenizer\.json is larger than 256 MiB, the limit for tokenizer files",
    ):
        load_tokenizer(planted)


def gguf(path: Path, kind: int, value: bytes, tensors: int = 0, fields: int = 1) -> Path:
    """A file whose metadata has one value of a kind, and counts that may be wrong."""
    counts = tensors.to_bytes(8, "little") + fields.to_bytes(8, "little")
    entry = (1).to_bytes(8, "little") + b"x" + kind.to_bytes(4, "little") + value
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + counts + entry + bytes(64))
    return path


ARRAY, BYTE, TEXT = 9, 0, 8


@pytest.mark.parametrize(
    ("kind", "value", "counts", "complaint"),
    [
        (
            ARRAY,
            ARRAY.to_bytes(4, "little") + (1).to_bytes(8, "little"),
            {},
            "has an array of arrays",
        ),
        (
            ARRAY,
            (ARRAY.to_bytes(4, "little") + (1).to_bytes(8, "little")) * 9999,
            {},
            "has an array of arrays",
        ),
        (
            ARRAY,
            BYTE.to_bytes(4, "little") + (2**40).to_bytes(8, "little"),
            {},
            "claims more than 4194304 entries",
        ),
        (TEXT, (2**40).to_bytes(8, "little"), {}, "a text in its metadata is too long"),
        (TEXT, (2**20).to_bytes(8, "little"), {}, "it ends too early"),
        (BYTE, b"", {"fields": 2**63}, "claims more than"),
        (BYTE, b"", {"tensors": 2**63}, "claims more than"),
    ],
)
def test_counts_in_a_gguf_file_are_not_believed(tmp_path, kind, value, counts, complaint):
    with pytest.raises(EasySpecError, match=complaint) as refusal:
        open_gguf(gguf(tmp_path / "a.gguf", kind, value, **counts))
    assert "\n" not in str(refusal.value)
