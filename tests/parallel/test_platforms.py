"""The table decides which kernels a model uses and how its steps are compiled."""

from dataclasses import replace

import pytest

from easyspec_jax.checkpoint.directory import open_checkpoint
from easyspec_jax.decode.programs import Programs
from easyspec_jax.decode.state import RoundConfig
from easyspec_jax.demo import DRAFT
from easyspec_jax.draft.layer_group import LayerGroup, load_block
from easyspec_jax.model.transformer import MLP
from easyspec_jax.options import SamplingParams
from easyspec_jax.parallel.mesh import MeshShape
from easyspec_jax.parallel.platforms import SETTINGS, PlatformSettings, settings_of
from easyspec_jax.verify import Greedy
from tests.support.models import load_target, loader

SOME = PlatformSettings(fused_attention=True, fused_mlp=True, split_keys_from=4096)
GROUPED = PlatformSettings(fused_groups=True)


def test_no_kernel_is_on_before_it_is_measured():
    """Except that of matrices with groups, which GPUs need to write no sums of groups."""
    every = {*SETTINGS.values(), settings_of("unknown")}
    others = dict.fromkeys(
        ("sorts_by_expert", "reads_parts", "pairs_tokens", "fills_tokens", "shortens_passes"), False
    )
    plain = {replace(own, **others) for own in every}
    assert plain == {PlatformSettings(), GROUPED}
    assert [name for name, own in SETTINGS.items() if own.pairs_tokens] == ["tpu"]
    assert [name for name, own in SETTINGS.items() if own.fills_tokens] == ["cpu"]
    for platform in ("cpu", "tpu", "unknown"):
        assert not settings_of(platform).fused_groups
    gpu = settings_of("gpu")
    assert not gpu.reads_parts and not gpu.shortens_passes  # its host would wait for every branch


@pytest.mark.parametrize("from_table", [True, False])
def test_modules_get_the_kernels_of_their_platform(monkeypatch, from_table):
    from_ = loader(open_checkpoint(DRAFT), MeshShape(1, 1))
    if from_table:
        monkeypatch.setitem(SETTINGS, "cpu", SOME)
    else:
        from_ = replace(from_, settings=SOME)
    group = load_block(from_, range(1, 4))
    assert isinstance(group, LayerGroup)
    assert group.fused
    for mlp in group.mlps:
        assert isinstance(mlp, MLP)
        assert mlp.fused
        assert mlp.interpret
    assert group.attention.interpret
    assert from_.attention(0).split_keys_from == group.attention.split_keys_from == 4096


@pytest.mark.parametrize(
    "settings", [GROUPED, PlatformSettings(pairs_tokens=True), PlatformSettings()], ids=str
)
def test_only_quantized_matrices_are_multiplied_otherwise(settings):
    from_ = replace(loader(open_checkpoint(DRAFT), MeshShape(1, 1)), settings=settings)
    for weights, fused in (("int4", settings.fused_groups), (None, False)):
        mlp = replace(from_, weights=weights).mlp(0)
        assert isinstance(mlp, MLP)
        for matrix in (mlp.gate_up.weight, mlp.down.weight):
            assert (matrix.fused, matrix.interpret) == (fused, weights is not None)
            assert matrix.pairs == (settings.pairs_tokens and weights is not None)


@pytest.mark.parametrize("from_table", [True, False])
def test_steps_get_the_compiler_options_of_their_platform(monkeypatch, from_table):
    """XLA refuses an option that it does not know, so it must have got it."""
    unknown = PlatformSettings({"no_such_option": True})
    from_ = loader(open_checkpoint(DRAFT), MeshShape(1, 1))
    config = RoundConfig(0, calibration=False, verifier=Greedy(), stop_ids=())
    programs = Programs(from_.mesh, load_target(from_), None, config)
    if from_table:
        monkeypatch.setitem(SETTINGS, "cpu", unknown)
    else:
        programs = replace(programs, settings=unknown)
    with pytest.raises(Exception, match="no_such_option"):
        programs.start(SamplingParams(), [1], 128)
