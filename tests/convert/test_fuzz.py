"""Damaged files give one line or a whole conversion, never a stack trace or a hang."""

import contextlib
import io
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.__main__ import main
from easyspec_jax.checkpoint.families import FAMILIES
from easyspec_jax.checkpoint.safetensors import INDEX
from experiments.bench.bench_checkpoints import write_random
from tests.convert.test_faults import FIELDS

pytestmark = pytest.mark.slow

GIB = 2**30
FUZZ = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

NUMBERS = (
    st.integers(-2, 300) | st.integers() | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30])
)
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
)


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Path]:
    """Write three shards whose headers of one to three tensors can be damaged."""
    with tempfile.TemporaryDirectory() as directory:
        write_random(Path(directory) / "hf", FIELDS, 3)
        yield Path(directory) / "hf"


@pytest.fixture(scope="module", autouse=True)
def memory_is_bounded() -> Iterator[None]:
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        yield
        return
    reset.write_text("5")  # from here on VmHWM counts anew
    before = resident(status, "VmRSS")
    yield
    assert resident(status, "VmHWM") - before < GIB


def resident(status: Path, field: str) -> int:
    return next(
        int(line.split()[1]) * 1024
        for line in status.read_text().splitlines()
        if line.startswith(field)
    )


def check(checkpoint: Path, damaged: dict[str, bytes]) -> int:
    """Convert the checkpoint with some files replaced, and return the exit code."""
    with tempfile.TemporaryDirectory() as directory:
        source, out = Path(directory) / "hf", Path(directory) / "out"
        shutil.copytree(checkpoint, source)
        for name, content in damaged.items():
            (source / name).write_bytes(content)
        printed, errors = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            code = main(["--hf", str(source), "--out", str(out)])
        lines = printed.getvalue() + errors.getvalue()
        assert lines.count("\n") == 1, lines
        assert (code, out.exists()) in ((0, True), (2, False)), lines
        assert sorted(path.name for path in Path(directory).iterdir()) == [
            "hf",
            *(["out"] if code == 0 else []),
        ]
        return code


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")


def test_undamaged_it_converts(checkpoint):
    assert check(checkpoint, {}) == 0


@FUZZ
@given(st.data())
def test_headers(checkpoint, data):
    shard = data.draw(st.sampled_from(sorted(checkpoint.glob("*.safetensors"))))
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    kind = data.draw(st.sampled_from(["length", "bytes", "entry", "field", "anything"]))
    if kind == "length":
        damaged = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    elif kind == "bytes":
        place = data.draw(st.integers(0, 8 + length - 1))
        damaged = (
            content[:place]
            + data.draw(st.binary(max_size=9))
            + content[place + data.draw(st.integers(0, 9)) :]
        )
    else:
        header = json.loads(content[8 : 8 + length])
        name = data.draw(st.sampled_from(sorted(header)))
        if kind == "entry":
            header[name] = data.draw(VALUES)
        elif kind == "field":
            header[name] |= {
                data.draw(st.sampled_from(["dtype", "shape", "data_offsets"])): data.draw(VALUES)
            }
        else:
            header = data.draw(VALUES)
        text = encoded(header)
        damaged = len(text).to_bytes(8, "little") + text + content[8 + length :]
    check(checkpoint, {shard.name: damaged})


@FUZZ
@given(st.data())
def test_indices(checkpoint, data):
    index = json.loads((checkpoint / INDEX).read_text())
    places = (
        st.sampled_from([*set(index["weight_map"].values()), "..", "/", "config.json", "", "\0"])
        | VALUES
    )
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(index["weight_map"])) | st.text(max_size=8))
        index["weight_map"][name] = data.draw(places)
    else:
        index = data.draw(
            VALUES
            | st.fixed_dictionaries({"weight_map": st.dictionaries(st.text(max_size=8), places)})
        )
    check(checkpoint, {INDEX: encoded(index)})


@FUZZ
@given(st.data())
def test_configurations(checkpoint, data):
    names = [
        *FIELDS,
        "head_dim",
        "rope_scaling",
        "rope_parameters",
        "rope_theta",
        "rms_norm_eps",
        "eos_token_id",
        "layer_types",
        "sliding_window",
        "attention_bias",
        "mlp_bias",
        "hidden_act",
        "embedding_multiplier",
        "logits_scaling",
        "final_logit_softcapping",
        "query_pre_attn_scalar",
        "sliding_window_pattern",
        "partial_rotary_factor",
        "torch_dtype",
        "num_experts",
    ]
    changes = data.draw(st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=3))
    model_types = st.sampled_from(sorted(FAMILIES))
    check(
        checkpoint,
        {"config.json": encoded(FIELDS | {"model_type": data.draw(model_types)} | changes)},
    )


@FUZZ
@given(st.binary(max_size=64))
def test_bytes_in_place_of_a_configuration(checkpoint, content):
    assert check(checkpoint, {"config.json": content, "generation_config.json": content}) == 2
