"""`--calibration` gives a checkpoint like any other of int4, or one line of error."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from convert import calibration as module
from convert import stream
from convert.__main__ import _parser, main
from convert.calibration import memory_needed
from convert.converting import ConvertConfig, convert
from convert.huggingface import open_huggingface
from easyspec_jax.calibrate import calibrating
from easyspec_jax.checkpoint.config import read_model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.families import EMBEDDING
from easyspec_jax.checkpoint.quantized import scale_name
from easyspec_jax.checkpoint.rounding import INT4_GROUPS
from easyspec_jax.errors import EasySpecError
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.tokenizer import encode, load_tokenizer
from tests.support.models import forward, load_target, loader, save_model

SENTENCE = "the cat sat on a mat while seven old dogs slept under two tall trees near our house"
ONE, TWO = MeshShape(1, 1), MeshShape(1, 2)


def _prose(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(SENTENCE.split(), words))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "calibration.txt"
    path.write_text(_prose(0, 700), encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path):
    save_model(tmp_path / "hf", "smollm2", num_hidden_layers=2, intermediate_size=64)
    return tmp_path / "hf"


def test_a_calibrated_checkpoint_is_nearer_to_the_floats(model, text, tmp_path):
    plain = ConvertConfig(weights="int4", dtype="float32")
    convert(model, tmp_path / "plain", plain)
    calibrated = ConvertConfig(
        weights="int4", dtype="float32", calibration=text, calibration_tokens=2600, verify=True
    )
    result = convert(model, tmp_path / "out", calibrated)
    assert result.integers == ("int4", "int8")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "plain").iterdir()
    }
    opened = {name: open_checkpoint(tmp_path / name) for name in ("hf", "plain", "out")}
    assert opened["out"].source.shapes() == opened["plain"].source.shapes()
    assert opened["out"].source.dtypes() == opened["plain"].source.dtypes()
    np.testing.assert_array_equal(
        opened["out"].source.read(EMBEDDING), opened["plain"].source.read(EMBEDDING)
    )
    ids = np.asarray([encode(load_tokenizer(model), _prose(1, 60))[:200]])

    def logits(name, shape=ONE):
        from_ = loader(opened[name], shape)
        return forward(load_target(from_), from_.mesh, ids)[..., :300]

    exact = logits("hf")
    nearest, found = (np.linalg.norm(logits(name) - exact) for name in ("plain", "out"))
    assert found < 0.9 * nearest
    two = logits("out", TWO)
    np.testing.assert_allclose(two, logits("out"), atol=1e-3)


def test_groups_have_the_size_that_is_asked_for(tmp_path):
    save_model(tmp_path / "hf", "llama3", num_hidden_layers=1, intermediate_size=96)
    for size, groups in ((None, (1, 3)), (64, (1, 3)), (32, (2, 3))):
        config = ConvertConfig(weights="int4", group_size=size, verify=True)
        out = tmp_path / str(size)
        for _ in range(2):  # the second time it is only verified
            convert(tmp_path / "hf", out, config)
        shapes = open_checkpoint(out).source.shapes()
        names = ("self_attn.q_proj", "mlp.down_proj")  # of 64 and 96 columns
        found = tuple(shapes[scale_name(f"model.layers.0.{name}.weight")][1] for name in names)
        assert found == groups


def test_a_gguf_file_is_calibrated_with_its_own_tokenizer(tiny_model, write_gguf, text, tmp_path):
    path = write_gguf(tiny_model(tie_word_embeddings=True))
    config = ConvertConfig(weights="int4", calibration=text, verify=True)
    convert(path, tmp_path / "out", config)
    assert open_checkpoint(tmp_path / "out").source.dtypes()[EMBEDDING] == "int8"


def test_an_interrupted_conversion_goes_on(model, text, tmp_path, monkeypatch):
    config = ConvertConfig(weights="int4", calibration=text)
    convert(model, tmp_path / "whole", config)
    plain, calls = calibrating.gptq, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 9:  # in the second layer
            raise KeyboardInterrupt
        return plain(*given)

    monkeypatch.setattr(calibrating, "gptq", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "out", config)
    convert(model, tmp_path / "out", config)
    assert len(calls) == 9 + 7, "the first layer was rounded before"
    assert open_checkpoint(tmp_path / "out").fingerprint == (
        open_checkpoint(tmp_path / "whole").fingerprint
    )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_interrupted_removal_misleads_no_later_run(model, text, tmp_path, monkeypatch):
    """A calibration that was half removed is not read again; the next run makes a new one."""
    config = ConvertConfig(weights="int4", calibration=text, verify=True)
    convert(model, tmp_path / "whole", config)
    plain = shutil.rmtree

    def interrupted(path, *rest, **options):
        if Path(path).suffix == ".gone" and Path(path).is_dir():
            plain(Path(path) / "layer-0")
            raise KeyboardInterrupt
        plain(path, *rest, **options)

    monkeypatch.setattr(stream.shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "out", config)
    monkeypatch.setattr(stream.shutil, "rmtree", plain)
    convert(model, tmp_path / "out", config)
    assert open_checkpoint(tmp_path / "out").fingerprint == (
        open_checkpoint(tmp_path / "whole").fingerprint
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_space_for_the_calibration_is_checked_before_it(model, text, tmp_path, monkeypatch):
    """There is enough for what is written in the end."""
    monkeypatch.setattr(calibrating, "gptq", None)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stream.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(EasySpecError, match=r"MB of free space and has 1\.0 MB"):
        convert(model, tmp_path / "out", ConvertConfig(weights="int4", calibration=text))
    convert(model, tmp_path / "plain", ConvertConfig(weights="int4"))


def test_every_text_begins_as_the_tokenizer_begins_one(model, text):
    opened, config = open_huggingface(model), read_model_config(model)
    plain = module.read_texts(text, 4096, opened, config)
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    one = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [one, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    }
    (model / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    begun = module.read_texts(text, 4096, open_huggingface(model), config)
    assert begun.shape[1] == plain.shape[1] == 512
    assert (begun[:, 0] == 1).all()
    np.testing.assert_array_equal(begun[:2, 1:].ravel(), plain.ravel()[: 2 * 511])


def test_no_more_of_a_text_is_read_than_its_tokens_need(model, text, tmp_path, monkeypatch):
    opened, config = open_huggingface(model), read_model_config(model)
    expected = module.read_texts(text, 2048, opened, config)
    content = text.read_text(encoding="utf-8")
    large = tmp_path / "large.txt"
    large.write_text(content * 200, encoding="utf-8")
    lengths = []
    encode = module.encode
    monkeypatch.setattr(
        module, "encode", lambda own, text: lengths.append(len(text)) or encode(own, text)
    )
    np.testing.assert_array_equal(module.read_texts(large, 2048, opened, config), expected)
    assert lengths == [2048 * module.CHARACTERS_A_TOKEN] and lengths[0] < 100 * len(content)


def test_the_command_knows_the_sizes_and_the_default():
    (group,) = (action for action in _parser()._actions if action.dest == "group_size")
    assert group.choices is not None and set(group.choices) == set(INT4_GROUPS)
    (tokens,) = (action for action in _parser()._actions if action.dest == "calibration_tokens")
    assert f"(default: {module.TOKENS})" in str(tokens.help)


def test_an_error_leaves_nothing_behind(model, text, tmp_path, monkeypatch):
    def fail(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(calibrating, "write_rounded", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(model, tmp_path / "out", ConvertConfig(weights="int4", calibration=text))
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "calibration.txt"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"calibration": "x"}, "`calibration` is for `weights` int4; leave it out"),
        ({"group_size": 32, "weights": "int8"}, "`group_size` is for `weights` int4; leave it out"),
        ({"group_size": 16, "weights": "int4"}, "`group_size` '16' is not one of 128, 64, 32"),
        (
            {"calibration_tokens": 4096, "weights": "int4"},
            "`calibration_tokens` needs `calibration` FILE",
        ),
        (
            {"calibration": "x", "calibration_tokens": 64, "weights": "int4"},
            "`calibration_tokens` 64 must be at least 2048",
        ),
    ],
)
def test_fields_that_do_not_go_together(fields, message):
    with pytest.raises(EasySpecError) as error:
        ConvertConfig(**fields)
    assert str(error.value) == message


def test_what_cannot_be_calibrated_is_refused_before_anything_is_read(
    model, text, tmp_path, monkeypatch
):
    def refused(match, path=text, source=model, **fields):
        config = ConvertConfig(weights="int4", calibration=path, **fields)
        with pytest.raises(EasySpecError, match=match):
            convert(source, tmp_path / "out", config)

    monkeypatch.setattr(module, "_calibrated", None)
    refused("`calibration` .*absent cannot be read", tmp_path / "absent")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    refused("`calibration` .*bytes cannot be read", tmp_path / "bytes")
    (tmp_path / "short").write_text("too short")
    refused("`calibration` .*short holds 9 tokens; give at least 2048", tmp_path / "short")
    (tmp_path / "empty").touch()
    refused("`calibration` .*empty holds 0 tokens; give at least 2048", tmp_path / "empty")
    fewer = read_model_config(model)
    with monkeypatch.context() as patched:
        patched.setattr(module, "model_config", lambda *_, **__: replace(fewer, vocab_size=20))
        refused(r"the tokenizer gives id \d+, for which .*hf has no embedding")
    refused(r"hf: `calibration` needs more memory; give `memory` of at least \d+", memory=1 << 28)
    save_model(tmp_path / "experts", "mixtral", num_hidden_layers=1)
    refused("experts is a mixture of experts, which cannot be", source=tmp_path / "experts")
    convert(model, tmp_path / "int4", ConvertConfig(weights="int4"))
    refused("int4 has layers of int4 already; leave out `calib", source=tmp_path / "int4")
    (tmp_path / "out").mkdir()
    refused("out exists, and `verify` does not repeat a `calibration`", verify=True)
    (model / "tokenizer.json").unlink()
    refused("hf has no tokenizer, which `calibration` needs")
    assert open_huggingface(model).has_tokenizer is False


def test_the_command_names_its_flags(model, text, tmp_path, capsys):
    command = ["--hf", str(model), "--out", str(tmp_path / "out"), "--calibration", str(text)]
    assert main(command) == 2
    assert capsys.readouterr().err.endswith(
        "convert: error: --calibration is for --weights int4; leave it out\n"
    )
    command += ["--weights", "int4", "--group-size", "32", "--calibration-tokens", "2048"]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert ", matrices int4 and int8" in printed.out
    assert printed.err.startswith("relative rounding errors: embed_tokens 0.")


def test_memory_grows_with_the_widest_inputs(model):
    config = read_model_config(model)
    assert memory_needed(config, 16384) > memory_needed(config, 2048) > 1 << 30
