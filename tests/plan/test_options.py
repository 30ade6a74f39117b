"""A PlanConfig refuses bad values when it is made, names them as fields, and needs no JAX."""

import subprocess
import sys
from typing import Any

import pytest

from easyspec_jax.errors import EasySpecError
from easyspec_jax.plan import PlanConfig


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"topology": "v9:2x4"}, "`topology` 'v9:2x4': no machine 'v9'"),
        ({"topology": "v5e"}, "`topology` 'v5e' does not say how many devices"),
        ({"topology": "v5e:8"}, "`topology` 'v5e:8': give the 2 sides of the torus"),
        ({"kv_dtype": "int4"}, "`kv_dtype` 'int4' is not one of auto, int8"),
        ({"lp_size": 0}, "lp.size.* 0 must be at least 1"),
        ({"mlp_lp_size": 0}, "mlp.lp.size.* 0 must be at least 1"),
        ({"num_speculative_tokens": 17}, "must be from 1 to 16"),
        ({"tree_width": 65}, "must be from 1 to 64"),
        ({"draft_tensor_parallel_size": "2"}, "'2' is not one of 1, all"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str):
    arguments: dict[str, Any] = {"topology": "v5e:2x4"} | fields
    with pytest.raises(EasySpecError, match=message):
        PlanConfig(**arguments)


def test_options_are_checked_without_importing_jax():
    program = "import sys; import easyspec_jax.plan as p; p.PlanConfig('v5e:2x4'); {}"
    found = []
    for last in ("print('jax' in sys.modules)", "p.plan; print('jax' in sys.modules)"):
        command = [sys.executable, "-c", program.format(last)]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(ran.stdout.strip())
    assert found == ["False", "True"]


def test_the_package_has_no_other_names():
    import easyspec_jax.plan as package

    with pytest.raises(AttributeError, match="has no attribute 'plans'"):
        package.plans  # noqa: B018
