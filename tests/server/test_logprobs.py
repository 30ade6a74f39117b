"""Forms of log-probabilities that a running server rarely shows."""

from easyspec_jax.engine.completion import TokenLogprobs
from easyspec_jax.server.logprobs import TextOffsets, of_chat, of_completion

CONTENTS = {1: b"\xe2\x82", 2: b"\xac!", 3: ("special", "<|end|>")}
LISTED = [TokenLogprobs(1, -1.0, [(1, -1.0), (2, -1.5)]), TokenLogprobs(2, -2.0, [])]


def test_tokens_within_a_character_are_spelled_as_bytes():
    found = of_chat(LISTED, CONTENTS)["content"]
    assert [token["token"] for token in found] == [r"bytes:\xe2\x82", r"bytes:\xac\x21"]
    assert bytes(found[0]["bytes"] + found[1]["bytes"]).decode() == "€!"
    assert found[0]["top_logprobs"][1]["bytes"] == [0xAC, 0x21]


def test_two_tokens_of_one_character_keep_apart():
    (best, _) = of_completion(LISTED, CONTENTS, TextOffsets())["top_logprobs"]
    assert best == {r"bytes:\xe2\x82": -1.0, r"bytes:\xac\x21": -1.5}


def test_special_tokens_and_ids_without_a_token():
    listed = [TokenLogprobs(3, 0.0, []), TokenLogprobs(99, -9.0, [])]
    assert of_completion(listed, CONTENTS, TextOffsets())["tokens"] == ["<|end|>", ""]


def test_offsets_are_those_of_the_text():
    """Two tokens of one character begin at the same place, also in two chunks."""
    offsets = TextOffsets()
    found = [of_completion([one], CONTENTS, offsets)["text_offset"] for one in [*LISTED, LISTED[0]]]
    assert found == [[0], [0], [2]]
