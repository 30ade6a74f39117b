import numpy as np
import pytest

from easyspec_jax.checkpoint.directory import open_checkpoint
from tests.models import save_model

LAYERS = 8
TEXTS = np.random.default_rng(5).integers(0, 300, (6, 24), np.int32)


@pytest.fixture(scope="session")
def draft(tmp_path_factory):
    """A checkpoint of eight layers, and transformers' model of it."""
    directory = tmp_path_factory.mktemp("refit_draft")
    reference = save_model(directory, "smollm2", num_hidden_layers=LAYERS)
    return open_checkpoint(directory), reference
