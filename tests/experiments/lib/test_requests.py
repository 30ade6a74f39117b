"""Requests are drawn from a seed."""

from itertools import islice

from experiments.lib.requests import WAYS, blocks


def test_a_block_has_one_way_of_sampling_and_begins_short():
    first, second = list(islice(blocks(0, 2, 8), 8)), list(islice(blocks(0, 2, 8), 16))[8:]
    for block, way in ((first, WAYS[0]), (second, WAYS[1])):
        assert {request.sampling.temperature for request in block} == {way.temperature}
        lengths = [request.sampling.max_new_tokens for request in block]
        assert max(lengths[:2]) <= 24 and lengths[2] >= 150 and max(lengths[3:]) <= 48
        assert all(request.prompt for request in block)


def test_a_seed_is_a_sequence():
    assert list(islice(blocks(3, 2, 8), 20)) == list(islice(blocks(3, 2, 8), 20))
    assert list(islice(blocks(3, 2, 8), 20)) != list(islice(blocks(4, 2, 8), 20))
