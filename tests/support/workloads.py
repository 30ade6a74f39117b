"""Workloads of models that are not here."""

from dataclasses import replace

from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.draft.grouping import Layout, paper_groups
from easyspec_jax.engine.abstract import absent_mesh
from easyspec_jax.engine.needs import Workload
from easyspec_jax.options import SamplingParams, SpeculativeConfig
from easyspec_jax.parallel.mesh import ALL_AXES, MeshShape
from easyspec_jax.plan.configurations import bundled


def large(**options) -> Workload:
    """Llama 3.3 70B with a 1B draft on TPUs that are not here."""
    target, draft = bundled()["Llama-3.3-70B"], bundled()["Llama-3.2-1B"]
    layout = Layout.uniform(paper_groups(draft.num_hidden_layers, 4))
    job = Workload(
        target,
        draft,
        layout,
        False,
        ALL_AXES,
        absent_mesh(MeshShape(4, 2), "tpu"),
        "bfloat16",
        RoundConfig.of(SpeculativeConfig(), SamplingParams(), ()),
        4000,
        100,
        1,
    )
    return replace(job, **options)
