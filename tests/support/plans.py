"""A small pair to plan for, a mesh of devices that are not there, and a machine that counts."""

import jax
import numpy as np

from easyspec_jax.checkpoint.config import model_config
from easyspec_jax.engine.abstract import absent_mesh
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.plan.machines import Machine
from easyspec_jax.plan.steps import Pair
from tests.support.models import family_config

TARGET_LAYERS, DRAFT_LAYERS, LEVELS = 3, 8, 4

UNIT = Machine("unit", "tpu", 10, 1.0, 1.0, 1.0, 0.0, launch=1.0, dimensions=0, source="")
"""A kernel takes a second, and there is room for ten bytes."""


def pair(tree_width: int = 1) -> Pair:
    target, draft = (
        model_config(family_config("llama3", num_hidden_layers=layers).to_dict())
        for layers in (TARGET_LAYERS, DRAFT_LAYERS)
    )
    return Pair(
        target,
        draft,
        np.dtype(np.float32),
        "8",
        LEVELS,
        tree_width,
        prompt_length=300,
        max_length=400,
    )


def absent(shape: MeshShape) -> jax.sharding.Mesh:
    return absent_mesh(shape, "tpu")
