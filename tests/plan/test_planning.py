"""A pair and a PlanConfig become a Plan; what does not suit the pair is refused by field."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.plan import PlanConfig, plan, planning
from easyspec_jax.plan.ahead import CannotCompile
from easyspec_jax.plan.report import as_dict
from easyspec_jax.plan.steps import Way
from easyspec_jax.progress import Advance

SHORT: dict[str, Any] = {"max_length": 400, "compile": False}


@pytest.mark.slow
def test_a_plan_compares_the_size_that_was_asked_for(configs, monkeypatch):
    monkeypatch.setattr(planning, "LP_SIZES", (2,))
    shown: list[tuple[str, int | None, int]] = []

    @contextmanager
    def bar(
        description: str, total: int | None = None, *, in_bytes: bool = False
    ) -> Iterator[Advance]:
        done: list[int] = []
        yield done.append
        shown.append((description, total, sum(done)))

    config = PlanConfig("v5e:2x4", lp_size=3, mlp_lp_size=4, refit=True, **SHORT)
    found = plan(configs["target"], str(configs["draft"]), config, bar=bar)
    assert (found.target_name, found.draft_name) == ("target", "draft")
    assert found.compiled_way == Way("easyspec", 3, "all", 3, refit=True)
    assert found.compiled is None
    assert [one.way.label for one in found.costs] == [
        "vanilla",
        "sd, draft TP 1",
        "sd, draft TP all",
        "easyspec N=2 M=2 refit, draft TP 1",
        "easyspec N=2 M=2 refit, draft TP all",
        "easyspec N=3 M=3 refit, draft TP 1",
        "easyspec N=3 M=3 refit, draft TP all",
    ]
    assert found.costs[0].mesh == MeshShape(1, 8)
    assert (found.pair.dtype.name, found.pair.mesh) == ("bfloat16", "8")
    assert (found.pair.prompt_length, found.pair.max_length) == (399, 400)
    assert shown == [("Counting", 7, 7)]
    assert as_dict(found)["compiled"]["reason"] == "--no-compile"


@pytest.mark.slow
def test_what_cannot_be_compiled_is_counted_all_the_same(configs, monkeypatch):
    def refuse(*_: Any) -> None:
        raise CannotCompile("no compiler here")

    monkeypatch.setattr(planning, "LP_SIZES", ())
    monkeypatch.setattr(planning, "topology_mesh", refuse)
    config = PlanConfig("v5e:2x4", dtype="float32", kv_dtype="int8", max_length=400, lp_size=2)
    found = plan(configs["target"], configs["draft"], config)
    assert found.compiled == "no compiler here"
    assert (found.pair.dtype, found.pair.kv_dtype) == (np.float32, "int8")
    assert len(found.costs) == 5


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_length": 5000}, "^`max_length` 5000 must be from 2 to the 1024 positions"),
        ({"max_length": 1}, "^`max_length` 1 must be from 2"),
        ({"lp_size": 7}, "^`lp_size` 7 must be from 1 to the draft's 6 layers"),
        ({"mesh": "4"}, "^`mesh` 4 has 4 devices, but v5e:2x4 has 8"),
    ],
)
def test_refusals(configs, fields: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"topology": "v5e:2x4"} | SHORT | fields
    config = PlanConfig(**arguments)
    with pytest.raises(EasySpecError, match=message):
        plan(configs["target"], configs["draft"], config)


@pytest.mark.parametrize("field", ["target", "draft"])
def test_unknown_models_are_named_by_argument(configs, field):
    models = {"target": configs["target"], "draft": configs["draft"], field: "Llama-9"}
    with pytest.raises(EasySpecError, match=f"^`{field}` 'Llama-9' is not a file"):
        plan(**models, config=PlanConfig("v5e:2x4", **SHORT))
