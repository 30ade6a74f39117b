"""Tokenizers from GGUF metadata split text as the originals do, and survive being saved."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import LlamaTokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.tokenization_utils_base import generate_merges

from convert.gguf_tokenizer import build_tokenizer, check_saved
from easyspec_jax.errors import EasySpecError
from easyspec_jax.tokenizer import decode_text, load_tokenizer

TEXTS = [
    "hello the 123 hello",
    "It's DON'T we'LL I'd",
    "12345678 1,234.5 ½ ٣٤ Ⅷ",
    "  two  spaces \n\n\t tab\r\nend   ",
    "日本語のテキスト 안녕하세요 Привет",
    "😀👍🏽 café café ﬁ",
    "def f(x):\n    return x**2 != 3  # ok",
    "a$b+c<d=e>f^g~h|i `code` …!?",
    "<|bos|>hello<tool>the<|end|>",
    "<| bos |><tool",
]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


@pytest.mark.parametrize(
    ("pre", "original"),
    [
        ("gpt-2", BYTE_LEVEL),
        (
            "smollm",
            pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
        ),
        ("qwen2", Qwen2Tokenizer().backend_tokenizer.pre_tokenizer),
        *(
            (name, split_by(TikTokenConverter().pattern))
            for name in ("llama-bpe", "llama3", "llama-v3")
        ),
    ],
)
def test_splits_text_as_the_original_tokenizer(tokenizer_metadata, pre, original):
    ours = build(tokenizer_metadata | {"tokenizer.ggml.pre": pre}).backend_tokenizer.pre_tokenizer
    for text in TEXTS:
        spans = [span for _, span in ours.pre_tokenize_str(text)]
        assert spans == [span for _, span in original.pre_tokenize_str(text)], text


@pytest.mark.parametrize("pre", ["deepseek-r1-qwen", "smaug-bpe", "tekken"])
def test_splits_text_as_transformers_does_for_gguf(tokenizer_metadata, pre):
    ours = build(tokenizer_metadata | {"tokenizer.ggml.pre": pre}).backend_tokenizer.pre_tokenizer
    original = split_by(GGUF_PRE_TOKENIZER_SPLITS[pre])
    for text in [*TEXTS, "camelCase XMLHttp ÉCOLE straße/path//\n"]:
        assert [span for _, span in ours.pre_tokenize_str(text)] == [
            span for _, span in original.pre_tokenize_str(text)
        ], text


def test_deepseek_llm_splits_as_llama_cpp_does(tokenizer_metadata):
    """Its six expressions split one after the other; the third matches ASCII letters too."""
    pre = build(
        tokenizer_metadata | {"tokenizer.ggml.pre": "deepseek-llm"}
    ).backend_tokenizer.pre_tokenizer
    text = "Señor Łukasz: 中文分詞, 12345!\r\n「好」。 ok  "
    pieces = [text[start:end] for _, (start, end) in pre.pre_tokenize_str(text)]
    expected = "Se|ñ|or| Ł|ukasz|:| |中文分詞|,| |12345|!|\r|\n|「好」|。| ok|  "
    assert pieces == expected.split("|")


def test_the_end_of_text_begins_where_each_says(tokenizer_metadata):
    for pre, begins in (
        ("tekken", True),
        ("smaug-bpe", False),
        ("deepseek-r1-qwen", False),
        ("deepseek-llm", False),
    ):
        metadata = tokenizer_metadata | {"tokenizer.ggml.pre": pre}
        bos = metadata["tokenizer.ggml.bos_token_id"]
        assert (build(metadata)("hello").input_ids[0] == bos) == begins


SENTENCEPIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "<|im_end|>",
    "<tool>",
    "▁",
    "▁▁",
    *"abcdehlorwt.1你",
    "▁h",
    "el",
    "lo",
    "▁hel",
    "▁hello",
    "wo",
    "▁wo",
    "ld",
    "▁wor",
    "▁world",
    "rl",
]
SENTENCEPIECE: dict[str, Any] = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": SENTENCEPIECES,
    "tokenizer.ggml.scores": [0.0] * 261
    + [-float(number) for number in range(len(SENTENCEPIECES) - 261)],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 3, 4, *[1] * (len(SENTENCEPIECES) - 261)],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def test_sentencepiece_splits_text_as_transformers_does(tmp_path):
    """The reference is Llama's own class, which derives its merges from the same scores."""
    vocab = {piece: number for number, piece in enumerate(SENTENCEPIECES)}
    scores = dict(zip(SENTENCEPIECES, SENTENCEPIECE["tokenizer.ggml.scores"], strict=True))
    theirs = LlamaTokenizer(vocab=vocab, merges=generate_merges(vocab, scores))
    ours = reopen(build(SENTENCEPIECE), tmp_path, "llama")
    for text in [
        "hello world",
        "hello  world. 1",
        "worldhello lo",
        "你 é 👍 hello",
        "the cat",
        "x",
    ]:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert ours(text).input_ids == [1, *ids], text
        assert decode_text(ours, [1, *ids]) == text


def test_sentencepiece_puts_a_blank_before_every_text_unless_told_otherwise():
    hello, world = map(SENTENCEPIECES.index, ("▁hello", "▁world"))
    plain = build(SENTENCEPIECE)
    assert plain("hello<|im_end|>world").input_ids == [1, hello, 259, world]
    assert plain("<tool>world").input_ids == [1, 260, world]
    bare = build(
        SENTENCEPIECE
        | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    )
    assert bare(" hello world").input_ids == [hello, world]
    assert decode_text(bare, [hello, world]) == " hello world"


def test_a_tokenizer_that_changes_when_it_is_saved_is_refused(tokenizer_metadata, tmp_path):
    built = build(tokenizer_metadata)
    built.save_pretrained(tmp_path)
    built.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(EasySpecError, match="is not the same after it was saved"):
        check_saved(built, tmp_path)


def test_default_splits_as_llama_cpp_does(tokenizer_metadata):
    # llama.cpp's four expressions, which no Hugging Face tokenizer has.
    pre = build(
        tokenizer_metadata | {"tokenizer.ggml.pre": "default"}
    ).backend_tokenizer.pre_tokenizer
    text = " ab!!c 12345"
    pieces = [text[start:end] for _, (start, end) in pre.pre_tokenize_str(text)]
    assert pieces == [" ab", "!!", "c", " ", "123", "45"]


@pytest.mark.parametrize(
    ("pre", "pieces"), [("gpt-2", ["123", "1"]), ("smollm", ["1", "2", "3", "1"])]
)
def test_digits_merge_only_where_splitting_lets_them(tokenizer_metadata, pre, pieces):
    assert build(tokenizer_metadata | {"tokenizer.ggml.pre": pre}).tokenize("1231") == pieces


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_opens_again_with_the_same_ids(tokenizer_metadata, tmp_path, family, add_bos):
    pre = "qwen2" if family == "qwen2" else "smollm"
    built = build(
        tokenizer_metadata
        | {
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.add_bos_token": add_bos,
            "tokenizer.ggml.add_eos_token": add_bos,
        }
    )
    opened = reopen(built, tmp_path, family)
    bos, eos = opened.convert_tokens_to_ids(["<|bos|>", "<|end|>"])
    for text in TEXTS:
        ids = opened(text).input_ids
        assert ids == built(text).input_ids, text
        inner = ids[1:-1] if add_bos else ids
        assert ids == ([bos, *inner, eos] if add_bos else inner)
        assert opened(text, add_special_tokens=False).input_ids == inner
        if family == "llama":  # Qwen2's normaliser composes characters, as it did in training
            assert opened.decode(inner) == text
    assert (opened.bos_token, opened.eos_token) == ("<|bos|>", "<|end|>")
    assert opened.chat_template == tokenizer_metadata["tokenizer.chat_template"]


def test_llama3_begins_with_bos_unless_told_otherwise(tokenizer_metadata):
    metadata = tokenizer_metadata | {"tokenizer.ggml.pre": "llama-bpe"}
    bos = metadata["tokenizer.ggml.bos_token_id"]
    assert build(metadata)("hello").input_ids[0] == bos
    assert bos not in build(metadata | {"tokenizer.ggml.add_bos_token": False})("hello").input_ids


def test_llama3_needs_no_merges_for_a_whole_token(tokenizer_metadata):
    merges = [merge for merge in tokenizer_metadata["tokenizer.ggml.merges"] if merge != "hell o"]
    metadata = tokenizer_metadata | {"tokenizer.ggml.merges": merges}
    assert build(metadata | {"tokenizer.ggml.pre": "gpt-2"}).tokenize("hello") == ["hell", "o"]
    assert build(metadata | {"tokenizer.ggml.pre": "llama-bpe"}).tokenize("hello") == ["hello"]


def test_qwen2_composes_unicode(tokenizer_metadata):
    tokenizer = build(tokenizer_metadata | {"tokenizer.ggml.pre": "qwen2"})
    assert tokenizer("cafe\u0301").input_ids == tokenizer("caf\u00e9").input_ids


def test_token_types_become_special_added_and_unused(tokenizer_metadata, tmp_path):
    tokenizer = reopen(build(tokenizer_metadata), tmp_path, "llama")
    ids = tokenizer("hello<tool>the<|eot|>").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[1] == "<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "hello<tool>the"
    assert "[PAD]" not in tokenizer.get_vocab()
    assert tokenizer("[PAD]").input_ids == [
        tokenizer_metadata["tokenizer.ggml.tokens"].index(c) for c in "[PAD]"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer model 'bert' is not supported"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores' is missing"),
        (
            {"tokenizer.ggml.pre": "falcon"},
            "pre-tokenizer 'falcon' is not supported; supported: deepseek-llm, ",
        ),
        ({"tokenizer.ggml.add_eos_token": True, "tokenizer.ggml.eos_token_id": 9999}, "damaged"),
        ({"tokenizer.ggml.token_type": [1]}, "damaged"),
        ({"tokenizer.ggml.merges": ["hello"]}, "damaged"),
    ],
)
def test_refuses_by_name(tokenizer_metadata, change, message):
    with pytest.raises(EasySpecError, match=message):
        build(tokenizer_metadata | change)


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("tokenizer.ggml.model", r"'\(none\)' is not supported"),
        ("tokenizer.ggml.pre", r"'\(none\)' is not supported"),
        ("tokenizer.ggml.merges", "merges' is missing"),
        ("tokenizer.ggml.bos_token_id", "bos_token' is missing"),
    ],
)
def test_names_what_is_missing(tokenizer_metadata, absent, message):
    metadata = tokenizer_metadata | {"tokenizer.ggml.add_bos_token": True}
    del metadata[absent]
    with pytest.raises(EasySpecError, match=message):
        build(metadata)


def build(metadata: dict[str, Any]) -> Any:
    return build_tokenizer(metadata, "tiny.gguf")


def reopen(tokenizer: Any, directory: Path, family: str) -> Any:
    """Save a tokenizer and open it from a checkpoint, whose model type must not matter."""
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": family}))
    return load_tokenizer(directory)


@pytest.mark.parametrize("role", ["padding", "unknown"])
def test_an_ordinary_token_with_a_role_stays_in_texts(tokenizer_metadata, tmp_path, role):
    """llama.cpp's converter gives id 0 to roles that a model has no token for."""
    number = tokenizer_metadata["tokenizer.ggml.tokens"].index("!")
    built = build(tokenizer_metadata | {f"tokenizer.ggml.{role}_token_id": number})
    for opened in (built, reopen(built, tmp_path, "llama")):
        ids = opened("hi!").input_ids
        assert ids[-1] == number
        assert decode_text(opened, ids) == "hi!"


def test_two_ids_of_one_token_are_refused(tokenizer_metadata):
    tokens = list(tokenizer_metadata["tokenizer.ggml.tokens"])
    tokens[1] = tokens[0]
    with pytest.raises(EasySpecError, match="two ids have the same token"):
        build(tokenizer_metadata | {"tokenizer.ggml.tokens": tokens})


@pytest.mark.parametrize(("name", "strips"), [("Phi-3 mini", True), ("phi3", True), ("Phi", False)])
def test_blanks_after_a_special_token_of_phi_3_vanish(tmp_path, name, strips):
    """As llama.cpp does for these names, and Phi-3's own tokenizer."""
    built = build(SENTENCEPIECE | {"general.name": name})
    for tokenizer in (built, reopen(built, tmp_path, "llama")):
        near, far = (tokenizer(f"<|im_end|>{blank}world").input_ids for blank in ("", " \n "))
        assert (near == far) == strips
        # Those that begin or end a text swallow nothing.
        assert tokenizer("<s>world").input_ids != tokenizer("<s>\nworld").input_ids
