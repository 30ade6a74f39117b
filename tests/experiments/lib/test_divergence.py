"""The gap at the first difference is that of the target's own logits."""

import numpy as np
import pytest
import torch

from easyspec_jax import SpeculativeConfig, open_model
from experiments.lib.divergence import divergence, first_difference, next_logits
from tests.support.models import save_model


@pytest.mark.parametrize("mesh", ["1", "2"])
def test_the_gap_is_that_of_transformers(tmp_path, mesh):
    reference = save_model(tmp_path, "smollm2")
    behind = next_logits(
        open_model(tmp_path, mesh=mesh, platform="cpu", speculative=SpeculativeConfig("vanilla"))
    )
    prompt, same = [5, 6, 7], [8, 9]
    with torch.no_grad():
        expected = reference(torch.tensor([prompt + same])).logits[0, -1].numpy()
    np.testing.assert_allclose(behind(prompt + same)[: len(expected)], expected, atol=1e-4)
    found = divergence(behind, prompt, [*same, 10, 11], [*same, 12, 11])
    assert found is not None and found.place == 2
    assert found.logit_gap == pytest.approx(abs(expected[10] - expected[12]), abs=1e-4)
    assert divergence(behind, prompt, same, same) is None
    ended = divergence(behind, prompt, same, [*same, 4])
    assert ended is not None and np.isnan(ended.logit_gap)


def test_the_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
