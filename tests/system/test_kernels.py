"""The demo pair decodes by fused kernels as it does without: the same text by the same drafts."""

from dataclasses import replace

import numpy as np
import pytest

from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.decode.loop import decode
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.demo import DRAFT, TARGET
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.draft.layer_group import LayerGroup, load_draft
from easyspec_jax.options import SamplingParams, Weights
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.parallel.platforms import PlatformSettings
from easyspec_jax.verify import Greedy
from tests.support.models import load_target, loader

pytestmark = pytest.mark.slow

PROMPTS = [np.random.default_rng(0).integers(4, 2000, size).tolist() for size in (30, 9)]
FUSED = PlatformSettings(fused_attention=True, fused_mlp=True)
SPLIT = PlatformSettings(split_keys_from=128)
GROUPED = PlatformSettings(fused_groups=True)


def rounds(
    mesh: MeshShape, settings: PlatformSettings, width: int, weights: Weights | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Decode; return each row's tokens, and how many of each round's levels were accepted."""
    target, draft = (open_checkpoint(path) for path in (TARGET, DRAFT))
    load = [
        replace(loader(of, mesh, ALL_AXES, other), settings=settings, weights=weights)
        for of, other in ((target, draft), (draft, target))
    ]
    layout = Layout.uniform(paper_groups(draft.config.num_hidden_layers, 4))
    drafting = load_draft(load[1], layout)
    groups = [block for block in drafting.blocks if isinstance(block, LayerGroup)]
    assert all(group.fused == settings.fused_attention for group in groups)
    assert all(group.attention.can_fuse() == (weights is None) for group in groups)
    config = RoundConfig(4, calibration=True, verifier=Greedy(), stop_ids=(), width=width)
    programs = Programs(load[0].mesh, load_target(load[0]), drafting, config)
    texts, accepted = [[] for _ in PROMPTS], []
    for report in decode(programs, PROMPTS, [24, 24], SamplingParams()):
        accepted.append(report.accepted.tolist())
        for row, text in enumerate(texts):
            text += report.tokens[row, : report.num_tokens[row]].tolist()
    return texts, accepted


@pytest.mark.parametrize(
    "mesh, settings, width, weights",
    [
        pytest.param(MeshShape(1, 1), FUSED, 1, None, marks=pytest.mark.exhaustive),
        (MeshShape(2, 1), FUSED, 2, None),
        (MeshShape(1, 1), SPLIT, 2, None),
        (MeshShape(2, 1), GROUPED, 2, "int4"),
    ],
    ids=str,
)
def test_the_demo_pair_drafts_and_decodes_as_without_kernels(mesh, settings, width, weights):
    expected = rounds(mesh, PlatformSettings(), width, weights)
    assert rounds(mesh, settings, width, weights) == expected
