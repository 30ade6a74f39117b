"""A RefitConfig that contradicts itself is refused, and the message names its field."""

import subprocess
import sys
from dataclasses import fields

import pytest

from easyspec_jax import EasySpecError
from easyspec_jax.cli.refit import _parser
from easyspec_jax.refit import RefitConfig


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"ridge": 0}, "`ridge` 0 must be a number above 0"),
        ({"ridge": float("nan")}, "`ridge` nan must be"),
        ({"tokens": 999}, "tokens.* 999 must be at least 1000"),
        ({"distill": -1}, "distill.* -1 must be at least 0"),
        ({"lp_size": 0}, "lp.size.* 0 must be at least 1"),
        ({"temperature": -1}, "temperature.* -1 must be"),
        ({"seed": -1}, "seed.* -1 must be"),
        ({"borders": "none"}, "borders.* 'none' is not one of measured, paper"),
        ({"prompts": "one"}, "`prompts` takes several prompts"),
        ({"prompts": []}, "`prompts` is empty"),
        ({"prompts": ["one"], "text": "file"}, "`text` and `prompts` exclude each other"),
        ({"answered_by": "me"}, "answered.by.* 'me' is not one of draft, target"),
        ({"answered_by": "target"}, "`answered_by` target needs `prompts`"),
        ({"chat": True}, "`chat` needs `prompts`"),
        ({"resume": True}, "`resume` only continues a distillation: give `distill` STEPS"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options, complaint):
    with pytest.raises(EasySpecError, match=complaint):
        RefitConfig(**options)


def test_single_layers_are_refused_once_their_number_is_known():
    with pytest.raises(EasySpecError, match="give an `lp_size` of at least 2"):
        RefitConfig(lp_size=1).layout(num_layers=8)
    with pytest.raises(EasySpecError, match="leaves out layer 4"):
        RefitConfig(lp_strategy="0-3").layout(num_layers=8)


def test_the_command_has_the_same_defaults():
    # The command reads prompts from a file, and --target says who answers them.
    flags = vars(_parser().parse_args([])) | {"prompts": None, "answered_by": "draft"}
    for field in fields(RefitConfig):
        assert flags[field.name] == field.default, field.name


def test_jax_is_not_imported():
    code = "import sys, easyspec_jax.refit; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
