"""Which spans of a trace count as what, by hand-made traces and by one of a real program."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData
from jax.sharding import PartitionSpec as P

from easyspec_jax import EasySpecError
from experiments.paper import timeline
from experiments.paper.timeline import (
    ROUND,
    by_bin,
    covered,
    is_collective,
    kind,
    lane,
    middle,
    runs,
    spans,
    timeline_of,
)


def plane(name, lines):
    """Write a plane; lines: by name, their events as (name, begin, end in ns, stats)."""
    events = [
        (line, *event, {}) if len(event) == 3 else (line, *event)
        for line in lines
        for event in lines[line]
    ]
    keys = sorted({key for *_, stats in events for key in stats})
    parts = [f'name: "{name}"']
    parts += [
        f'stat_metadata {{ key: {n} value {{ id: {n} name: "{key}" }} }}'
        for n, key in enumerate(keys, 1)
    ]
    for number, (_, label, *_rest) in enumerate(events, 1):
        parts.append(f'event_metadata {{ key: {number} value {{ id: {number} name: "{label}" }} }}')
    for line in lines:
        own = [(number, event) for number, event in enumerate(events, 1) if event[0] == line]
        texts = " ".join(event_text(number, event, keys) for number, event in own)
        parts.append(f'lines {{ name: "{line}" {texts} }}')
    return f"planes {{ {' '.join(parts)} }}"


def event_text(number, event, keys):
    _, _, begin, end, stats = event
    told = " ".join(
        f"stats {{ metadata_id: {keys.index(key) + 1} "
        + (f'str_value: "{value}" }}' if isinstance(value, str) else f"int64_value: {value} }}")
        for key, value in stats.items()
    )
    when = f"offset_ps: {1000 * begin} duration_ps: {1000 * (end - begin)}"
    return f"events {{ metadata_id: {number} {when} {told} }}"


def parse(*planes):
    return timeline_of(ProfileData.from_text_proto("\n".join(planes)))


def on(device, name):
    return {"hlo_op": name, "device_ordinal": device}


def test_kinds_of_operations():
    assert [
        kind(name)
        for name in ("psum.12", "all_gather", "%while.3 = (s32[]) while(…)", "add_fusion.1")
    ] == [
        "psum",
        "all-gather",
        "while",
        "add-fusion",
    ]
    names = (
        "psum.1",
        "all_gather.4",
        "%all-reduce-start.2 = f32[]",
        "ncclDevKernel_AllReduce_Sum_f32_RING_LL(…)",
    )
    assert all(map(is_collective, names))
    assert not any(
        map(
            is_collective,
            ("dot.1", "wrapped_reduce-window.3", "reduce_divide_fusion", "psum_fusion.1"),
        )
    )


def test_what_overlaps_counts_once():
    own = spans([(6, 8), (0, 4), (2, 3), (3, 5)])
    np.testing.assert_array_equal(timeline.union(own), [[0, 5], [6, 8]])
    np.testing.assert_allclose(covered(own, np.array([0.0, 4, 7, 9])), [4, 2, 1])
    np.testing.assert_array_equal(covered(spans([]), np.array([0.0, 1, 2])), [0, 0])


def test_a_cpu_device_is_what_its_operations_say_on_whatever_thread():
    threads = {
        "a": [
            ("while.1", 0, 90, on(0, "while.1")),
            ("dot.1", 10, 30, on(0, "dot.1")),
            ("end: dot.1", 29, 80),
            ("psum.1", 30, 50, on(0, "psum.1")),
            ("dot.1", 60, 70, on(1, "dot.1")),
        ],
        "b": [("copy.1", 40, 60, on(0, "copy.1")), ("end: copy.7", 95, 99), ("Rendezvous", 0, 99)],
        "python": [(ROUND, 0, 100)],
    }
    own = parse(plane("/host:CPU", threads))
    np.testing.assert_array_equal(own.rounds, [[0, 100]])
    assert own.devices == [0, 1]
    # 20 in dot and 20 in copy, of which 10 beside psum's 20; a loop lasts as long as what is in it.
    np.testing.assert_allclose(by_bin(own, 0, np.array([0.0, 100])), [[40], [10], [50]])
    np.testing.assert_allclose(
        by_bin(own, 1, np.array([0.0, 60, 100])), [[0, 10], [0, 0], [60, 30]]
    )


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        (
            "/device:GPU:3",
            {"Stream #1": [("fusion", 5, 7)], "Stream #2": [("ncclDevKernel_AllReduce", 6, 9)]},
        ),
        (
            "/device:TPU:3",
            {
                "XLA Modules": [("jit", 0, 10)],
                "XLA Ops": [("%fusion.1 = f32[]", 5, 7), ("%all-reduce.1 = f32[]", 6, 9)],
            },
        ),
    ],
)
def test_an_accelerator_is_its_plane(name, lines):
    own = parse(plane("/host:CPU", {"main": [(ROUND, 0, 10)]}), plane(name, lines))
    assert own.devices == [3]
    np.testing.assert_allclose(by_bin(own, 3, np.array([0.0, 10])), [[2], [2], [6]])


def test_a_trace_without_rounds_or_operations_is_refused(tmp_path):
    with pytest.raises(EasySpecError, match="0 rounds and operations of 1 devices"):
        parse(plane("/host:CPU", {"a": [("dot.1", 0, 1, on(0, "dot.1"))]}))
    with pytest.raises(EasySpecError, match="1 rounds and operations of 0 devices"):
        parse(plane("/host:CPU", {"a": [(ROUND, 0, 1), ("end: dot.1", 0, 1)]}))
    with pytest.raises(EasySpecError, match="holds 0 traces"):
        timeline.read_profile(tmp_path)


def test_lanes():
    assert lane(np.array([[3, 1, 0, 0], [0, 2, 1, 1], [1, 0, 5, 2]])) == "cx.."
    assert runs("ccx..c", "c") == [(0, 2), (5, 1)]
    assert runs("ccx..c", "xc") == [(0, 3), (5, 1)]
    assert runs("ccx", ".") == []
    assert middle(spans([(0, 9), (10, 11), (20, 25)])) == (20, 25)


def test_every_device_runs_the_same_operations_in_a_real_trace(tmp_path):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def body(x):
        step = lambda x, _: (jax.lax.psum(jnp.tanh(x @ x), "x"), None)  # noqa: E731
        return jax.lax.scan(step, x, length=5)[0]

    program = jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    )
    x = jax.device_put(jnp.ones((4 * 16, 16), jnp.float32), jax.NamedSharding(mesh, P("x")))
    program(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            with jax.profiler.TraceAnnotation(ROUND):
                program(x).block_until_ready()
    own = timeline.timeline_of(timeline.read_profile(tmp_path))
    assert len(own.rounds) == 3
    assert own.devices == [0, 1, 2, 3]
    for begin, end in own.rounds:
        for each in (own.computing, own.collectives):
            inside = {
                device: ((begin <= s) & (s <= end)).all(axis=1).sum() for device, s in each.items()
            }
            assert len(set(inside.values())) == 1
        assert inside == dict.fromkeys(range(4), 5)


def test_examples_are_true():
    found = doctest.testmod(timeline)
    assert found.attempted > 0 and found.failed == 0
