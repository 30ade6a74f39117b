"""Streamed text comes in whole characters, and depends on the ids alone."""

import itertools
import random
from os import path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from easyspec_jax.tokenizer import encode
from easyspec_jax.tokenizer.stream import TextStream, _Overlap, decode_text
from tests.support.models import TEXTS, byte_tokenizer, trained_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return trained_tokenizer()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("longest", [1, 2, 5, 1000])
def test_a_stream_shows_whole_characters_and_all_of_them(tokenizer, text, longest):
    ids = [*encode(tokenizer, text, chat=False), tokenizer.eos_token_id]
    chance, stream, shown, start = random.Random(0), TextStream(tokenizer), "", 0
    while start < len(ids):
        count = chance.randint(1, longest)
        shown += stream.push(ids[start : start + count])
        start += count
        assert text.startswith(shown)
    assert shown + stream.rest() == text == decode_text(tokenizer, ids)


def test_some_tokens_do_end_inside_a_character(tokenizer):
    pieces = [
        decode_text(tokenizer, [i])
        for i in encode(tokenizer, TEXTS["cjk"] + TEXTS["emoji"], chat=False)
    ]
    assert (
        sum("\ufffd" in piece for piece in pieces) > 10
    )  # else the tests of the stream prove nothing


def test_a_stream_that_breaks_off_inside_a_character_holds_it_back_to_the_end(tokenizer):
    ids = encode(tokenizer, "ab👍", chat=False)
    stream = TextStream(tokenizer)
    assert "".join(stream.push([i]) for i in ids[:-1]) == "ab"
    assert stream.rest() == "\ufffd"
    assert stream.push(ids[-1:]) == "👍"
    assert stream.rest() == ""


def test_spaces_are_left_as_they_are(tokenizer):
    # clean_up_tokenization_spaces would tidy this, and so change text that is already shown.
    text = "it 's here , he said ."
    assert decode_text(tokenizer, encode(tokenizer, text, chat=False)) == text


@pytest.mark.parametrize(
    "stop",
    [
        ["mat"],
        ["cat", "on the"],
        ["t s", "at sat on"],
        ["the mat."],
        ["\n", "mat"],
        ["a", "cat"],  # one token completes both
    ],
)
@pytest.mark.parametrize("longest", [1, 3, 1000])
def test_a_stream_ends_before_the_first_stop_string(tokenizer, stop, longest):
    text = TEXTS["ascii"] + ", and so on"
    found = sorted((text.index(s) + len(s), text.index(s)) for s in stop if s in text)
    expected = text[: found[0][1]] if found else text
    ids = encode(tokenizer, text)
    chance, stream, shown, start = random.Random(0), TextStream(tokenizer, stop), "", 0
    while start < len(ids) and not stream.stopped:
        count = chance.randint(1, longest)
        shown += stream.push(ids[start : start + count])
        start += count
        assert expected.startswith(shown)
    assert shown + stream.rest() == expected == stream.text
    assert stream.stopped == bool(found)
    kept = decode_text(tokenizer, stream.ids)
    assert any(s in kept for s in stop) == bool(found)
    assert not any(
        s in decode_text(tokenizer, stream.ids[:-1]) for s in stop
    )  # not one id more than it takes


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_stop_string_before_half_a_character_is_found_at_once(tokenizer, cut):
    """The ids that complete it may hold more text; ids of earlier pushes are never dropped."""
    text = TEXTS["ascii"] + TEXTS["emoji"]
    ids = encode(tokenizer, text)[: len(encode(tokenizer, TEXTS["ascii"])) + 2 + cut]
    assert decode_text(tokenizer, ids).startswith(TEXTS["ascii"])
    for first in range(1, len(ids)):
        stream = TextStream(tokenizer, ["mat"])
        stream.push(ids[:first])
        kept = len(stream.ids)
        if not stream.stopped:
            stream.push(ids[first:])
            assert len(stream.ids) > kept
        assert stream.stopped
        assert stream.text == TEXTS["ascii"][:-3]


def test_a_stop_string_across_characters_of_many_bytes(tokenizer):
    text = TEXTS["cjk"]
    for longest in (1, 4):
        stream = TextStream(tokenizer, [text[5:7]])
        ids = encode(tokenizer, text)
        shown = "".join(
            stream.push(ids[i : i + longest])
            for i in range(0, len(ids), longest)
            if not stream.stopped
        )
        assert shown + stream.rest() == text[:5]


def test_half_a_character_completes_no_stop_string(tokenizer):
    stream = TextStream(tokenizer, ["\ufffd"])
    ids = encode(tokenizer, "ab👍 c", chat=False)
    assert "".join(stream.push([number]) for number in ids) == stream.text == "ab👍 c"
    assert not stream.stopped


SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
PIECES = [
    *SPECIAL,
    "▁",
    "▁▁",
    "▁Hello",
    "▁world",
    "x",
    "a",
    "你",
    *(f"<0x{byte:02X}>" for byte in range(256)),
]
BLANK, BYTES, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
DECODERS = {
    "llama": decoders.Sequence([BLANK, BYTES, FUSE, decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence([BLANK, BYTES, FUSE]),
    "two blanks": decoders.Sequence([BLANK, BYTES, FUSE, decoders.Strip(" ", 2, 0)]),
    "metaspace": decoders.Metaspace(),
    "metaspace, no prefix": decoders.Metaspace(prepend_scheme="never"),
    "bytes": decoders.ByteLevel(),
    "none": None,
    # None of these can be shown before the end, but the text is right.
    "wordpiece": decoders.WordPiece(),
    "suffix": decoders.BPEDecoder("a"),
    "strips the end": decoders.Strip("x", 0, 1),
    "replaces across tokens": decoders.Sequence([FUSE, decoders.Replace("xa", "!")]),
    "replaces across bytes": decoders.Sequence([decoders.ByteLevel(), decoders.Replace("xa", "!")]),
}


def spelled_by(decoder: decoders.Decoder | None) -> PreTrainedTokenizerFast:
    """Make a tokenizer with sentencepiece's tokens, bytes included, and a given decoder."""
    vocab = {piece: number for number, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {name: spelled_by(decoder) for name, decoder in DECODERS.items()} | {
    "trained": trained_tokenizer()
}
BYTES_OF = [
    [PIECES.index(f"<0x{byte:02X}>") for byte in character.encode()] for character in "é你👍\ufffd"
]
IDS = st.lists(
    st.sampled_from(BYTES_OF) | st.integers(0, len(PIECES) + 2).map(lambda number: [number]),
    max_size=12,
).map(lambda runs: list(itertools.chain(*runs)))


def expected_text(tokenizer: PreTrainedTokenizerFast, prompt: list[int], ids: list[int]) -> str:
    """Return the text by its definition: decode all ids, and cut off the decoded prompt."""
    whole, before = (decode_text(tokenizer, [*prompt, *more]) for more in (ids, []))
    return whole[len(path.commonprefix((before, whole))) :]  # noqa: RUF071


def streamed(stream: TextStream, ids: list[int], sizes: list[int]) -> list[str]:
    """Push ids in portions of given sizes, over and over, and return the pieces."""
    pieces, start = [], 0
    while start < len(ids):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(ids[start : start + size]))
        start += size
    return pieces


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=200, deadline=None)
@given(prompt=IDS, ids=IDS, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_text_is_a_function_of_the_ids_alone(name, prompt, ids, sizes):
    tokenizer = TOKENIZERS[name]
    expected = expected_text(tokenizer, prompt, ids)
    stream = TextStream(tokenizer, prompt_ids=prompt)
    pieces = streamed(stream, ids, sizes)
    assert expected.startswith("".join(pieces))  # nothing was shown that did not stay
    assert "".join(pieces) + stream.rest() == stream.text == expected


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(
    prompt=IDS,
    ids=IDS,
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    stop=st.lists(
        st.sampled_from(["x", "xa", "你", " ", "Hello w", "é你", "ax"]), min_size=1, max_size=3
    ),
)
def test_where_a_stop_string_ends_a_text_is_a_function_of_the_ids_alone(
    name, prompt, ids, sizes, stop
):
    tokenizer = TOKENIZERS[name]
    one, other = (TextStream(tokenizer, stop, prompt) for _ in range(2))
    pieces, others = streamed(one, ids, sizes), streamed(other, ids, [1])
    assert "".join(pieces) + one.rest() == "".join(others) + other.rest() == one.text
    assert (one.ids, one.stopped) == (other.ids, other.stopped)
    texts = [
        expected_text(tokenizer, prompt, ids[:end]).rstrip("\ufffd") for end in range(len(ids) + 1)
    ]
    ends = [end for end, text in enumerate(texts) if any(s in text for s in stop)]
    assert one.stopped == bool(ends)
    assert one.ids == ids[: ends[0] if ends else len(ids)]
    assert not any(s in one.text for s in stop) or not one.stopped


@pytest.mark.parametrize("name", ["llama", "metaspace", "bytes", "trained"])
def test_text_is_shown_as_it_comes(name):
    """Holding everything back to the end would satisfy the tests above."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer("x a x a x a x", add_special_tokens=False).input_ids
    stream = TextStream(tokenizer)
    pieces = [stream.push([number]) for number in ids]
    assert sum(map(bool, pieces)) > len(ids) // 2
    assert stream.rest() == ""


def test_what_a_stop_id_would_say_is_not_shown():
    """Some checkpoints end turns with a token that is not special in their tokenizer."""
    tokenizer, (x, a) = TOKENIZERS["gemma"], map(PIECES.index, "xa")
    stream = TextStream(tokenizer, stop_ids=[a])
    assert stream.push([x, a]) + stream.rest() == stream.text == "x"
    assert stream.ids == [x, a]


def most_decoded(
    tokenizer: PreTrainedTokenizerFast, prompt: list[int], ids: list[int], monkeypatch
) -> int:
    """Push ids one by one, and return how many are decoded at once at most."""
    stream, decoded = TextStream(tokenizer, prompt_ids=prompt), []
    decode = stream._decoder.decode
    monkeypatch.setattr(
        stream._decoder, "decode", lambda ids: (decoded.append(len(ids)), decode(ids))[1]
    )
    for number in ids:
        stream.push([number])
    assert stream.text.strip() == decode(ids).strip()
    return max(decoded[:-1])


def test_a_text_of_many_tokens_is_decoded_once(monkeypatch):
    """Each step decodes a few tokens, not all of them."""
    prompt = [PIECES.index("▁Hello")] * 1000
    ids = [PIECES.index("▁world"), PIECES.index("▁Hello")] * 500
    assert most_decoded(TOKENIZERS["llama"], prompt, ids, monkeypatch) <= 4


def test_characters_of_several_tokens_are_decoded_once(monkeypatch):
    """No token by itself spells such a character."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("😀ж", add_special_tokens=False).input_ids * 300
    assert len(ids) == 6 * 300
    assert most_decoded(tokenizer, [], ids, monkeypatch) <= 8


def test_stop_strings_that_nearly_match_are_compared_once():
    """The letters of a text decide one after the other how much of it may become a stop string."""
    overlap = _Overlap("aab" * 1000)
    read = []
    following = overlap._next
    overlap._next = lambda length, letter: (read.append(letter), following(length, letter))[1]  # pyright: ignore[reportAttributeAccessIssue]
    text = ""
    for _ in range(500):
        text += "aab"
        overlap.follow(text)
        assert overlap.length == len(text)
    overlap.follow(text + "aa")
    overlap.follow(text + "aaa")
    assert overlap.length == 2 and len(read) < 4 * len(text)


def test_a_very_long_stop_string_costs_no_time():
    tokenizer, (x,) = TOKENIZERS["gemma"], map(PIECES.index, "x")
    stream = TextStream(tokenizer, ["x" * 10**6 + "a", "x" * 5 + "b"])
    assert stream.push([x] * 300) == ""
    assert stream.rest() == stream.text == "x" * 300
