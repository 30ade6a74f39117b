"""docs/families.md quotes the code that it walks through, and joined tensors are checked."""

import re
from pathlib import Path

import pytest
import transformers

from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.checkpoint.families import phi
from easyspec_jax.checkpoint.rope import LongRopeScaling
from easyspec_jax.errors import EasySpecError
from tests.support.models import family_config

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def test_the_page_quotes_the_code():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    code = Path(phi.__file__).read_text()
    for block in blocks:
        assert block in code


def test_phi3_reads_longrope_by_its_old_name():
    config = family_config("phi3").to_dict() | {"partial_rotary_factor": 0.5, "sliding_window": 63}
    config["rope_parameters"] = None
    factors = {"short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
    for name in ({"type": "su"}, {"type": "yarn"}, {"rope_type": "su"}):
        (kind,) = model_config(config | {"rope_scaling": name | factors}).kinds
        assert (kind.window, kind.rope.dim) == (63, 6)
        assert isinstance(kind.rope.scaling, LongRopeScaling)
        assert kind.rope.scaling.original == 4096


def test_joined_tensors_are_checked_as_they_are_stored(tmp_path):
    model = transformers.AutoModelForCausalLM.from_config(family_config("phi3"))
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace('"num_key_value_heads": 2', '"num_key_value_heads": 4')
    )
    with pytest.raises(
        EasySpecError, match=r"qkv_proj\.weight has shape \(96, 48\) instead of \(144, 48\)"
    ):
        open_checkpoint(tmp_path)
