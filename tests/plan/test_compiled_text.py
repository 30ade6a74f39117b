"""What a compiled program's text says, against programs whose kernels are known."""

import jax
import jax.numpy as jnp
import pytest

from easyspec_jax.plan.compiled_text import CompiledText, _bytes

LOOP = """\
HloModule jit_round, is_scheduled=true

%fused_transpose (p: bf16[1024,2048]) -> bf16[2048,1024] {
  %p = bf16[1024,2048]{1,0} parameter(0)
  ROOT %t = bf16[2048,1024]{1,0} transpose(%p), dimensions={1,0}
}

%fused_multiply (p.1: bf16[1024,2048], p.2: bf16[2048]) -> bf16[1024,2048] {
  %p.1 = bf16[1024,2048]{1,0} parameter(0)
  %p.2 = bf16[2048]{0} parameter(1)
  %b = bf16[1024,2048]{1,0} broadcast(%p.2), dimensions={1}
  ROOT %m = bf16[1024,2048]{1,0} multiply(%p.1, %b)
}

%fused_update (p.3: bf16[1024,2048], p.4: bf16[1,2048], p.5: s32[]) -> bf16[1024,2048] {
  %p.3 = bf16[1024,2048]{1,0} parameter(0)
  %p.4 = bf16[1,2048]{1,0} parameter(1)
  %p.5 = s32[] parameter(2)
  ROOT %u = bf16[1024,2048]{1,0} dynamic-update-slice(%p.3, %p.4, %p.5, %p.5)
}

%body (t.1: (s32[], bf16[1024,2048])) -> (s32[], bf16[1024,2048]) {
  %t.1 = (s32[], /*index=1*/bf16[1024,2048]{1,0}) parameter(0)
  %g = bf16[1024,2048]{1,0} get-tuple-element(%t.1), index=1
  %start = ((bf16[8]{0}), bf16[8]{0}) fusion-start(%g), kind=kLoop, calls=%fused_multiply
  %done = bf16[8]{0} fusion-done(%start)
  %spilled = bf16[1024,2048]{1,0} fusion(%g, %done), kind=kLoop, calls=%fused_multiply
  ROOT %r = (s32[], bf16[1024,2048]{1,0}) tuple(%g, %spilled)
}

%condition (t.2: (s32[], bf16[1024,2048])) -> pred[] {
  %t.2 = (s32[], bf16[1024,2048]{1,0}) parameter(0)
  ROOT %less = pred[] fusion(%t.2), kind=kLoop, calls=%fused_multiply
}

ENTRY %main (x: bf16[1024,2048]) -> bf16[1024,2048] {
  %x = bf16[1024,2048]{1,0} parameter(0)
  %turned = bf16[2048,1024]{1,0} fusion(%x), kind=kInput, calls=%fused_transpose
  %written = bf16[1024,2048]{1,0} fusion(%x, %x, %x), kind=kLoop, calls=%fused_update
  %w = (s32[], bf16[1024,2048]{1,0}) while(%x), condition=%condition, body=%body, TRIPS
  %call = f32[] custom-call(%w), custom_call_target="xla_ffi_python_gpu_callback"
  ROOT %last = bf16[1024,2048]{1,0} get-tuple-element(%w), index=1
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"4"}}'


@pytest.fixture
def text() -> CompiledText:
    return CompiledText.read(LOOP.replace("TRIPS", KNOWN))


def test_kernels_of_a_loop_count_as_often_as_it_runs(text):
    assert {kernel.name: kernel.times for kernel in text.kernels} == {
        "turned": 1,
        "written": 1,
        "call": 1,
        "start": 4,
        "spilled": 4,
    }
    assert (text.launches, text.looped) == (3 + 2 * 4, 2)


def test_a_transposed_matrix_is_a_copy_and_a_written_product_is_spilled(text):
    (copy,), (spilled,) = text.copies, text.spilled
    assert (copy.name, copy.shape, copy.bytes) == ("turned", "bf16[2048,1024]", 2**22)
    assert (spilled.name, spilled.dimensions) == ("spilled", (1024, 2048))


def test_waits_for_the_host_are_named(text):
    assert text.host_waits == ("custom-call call",)
    unknown = CompiledText.read(LOOP.replace("TRIPS", "frontend_attributes={}"))
    assert unknown.host_waits[1:] == ("while w without a known number of iterations",)
    assert unknown.launches == 3 + 2


def test_tokens_have_no_bytes():
    assert _bytes(("token", "")) == 0
    assert _bytes(("bf16", "8,64")) == 1024


def test_programs_that_jax_compiles_can_be_read():
    def program(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.sin(y @ x) + y, x)

    compiled = jax.jit(program).lower(jnp.ones((8, 8))).compile().as_text()
    assert compiled is not None
    text = CompiledText.read(compiled)
    assert text.looped > 0 and text.launches >= 3 * text.looped
    assert not text.copies and not text.spilled


def test_a_large_transpose_that_xla_compiles_is_found():
    lowered = jax.jit(jnp.transpose).lower(jax.ShapeDtypeStruct((1024, 512), jnp.float32))
    compiled = lowered.compile().as_text()
    assert compiled is not None
    assert [copy.bytes for copy in CompiledText.read(compiled).copies] == [2**21]


def test_a_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="without an entry"):
        CompiledText.read("HloModule empty\n")
