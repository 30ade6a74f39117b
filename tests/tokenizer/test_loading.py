"""Tokenizers follow their files, those that disagree are refused, and prompts become ids."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from easyspec_jax.errors import EasySpecError
from easyspec_jax.tokenizer import (
    bad_words_ids,
    decode_text,
    encode,
    have_same_ids,
    load_tokenizer,
)
from tests.support.models import BOS, EOS, TEXTS, trained_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return trained_tokenizer()


def vocabulary(special: tuple[str, ...] = (), **ids: int) -> SimpleNamespace:
    added = {ids[token]: SimpleNamespace(special=True) for token in special}
    return SimpleNamespace(get_vocab=lambda: ids, added_tokens_decoder=added)


@pytest.mark.parametrize(
    "draft",
    [
        pytest.param({"a": 0, "b": 1, "c": 2}, id="same"),
        pytest.param({"a": 0, "c": 2}, id="subset"),
        pytest.param({"a": 0, "b": 1, "c": 2, "d": 3}, id="superset"),
        pytest.param({"b": 1, "d": 7}, id="overlap"),
    ],
)
def test_tokens_known_to_both_may_be_any_part_of_the_vocabularies(draft):
    target = vocabulary(a=0, b=1, c=2)
    assert have_same_ids(target, vocabulary(**draft))
    assert have_same_ids(vocabulary(**draft), target)


def test_special_tokens_may_be_renamed_and_moved():
    """Llama 3 is a common target, and Llama 3.2, which renames special tokens, its draft."""
    target = vocabulary(
        special=("eot", "reserved_2", "reserved_3"), a=0, eot=9, reserved_2=4, reserved_3=5
    )
    draft = vocabulary(special=("eot", "pad", "reserved_2"), a=0, eot=9, pad=4, reserved_2=5)
    assert have_same_ids(target, draft)
    assert have_same_ids(draft, target)
    assert not have_same_ids(target, vocabulary(special=("eot",), a=0, eot=9, pad=4))


@pytest.mark.parametrize(
    "draft",
    [
        pytest.param({"a": 0, "b": 2, "d": 1}, id="differing id"),
        pytest.param({"a": 0, "x": 1}, id="shared id"),
        pytest.param({"c": 5}, id="id unknown to the target"),
    ],
)
def test_a_token_with_two_ids_or_an_id_with_two_tokens_is_noticed(draft):
    assert not have_same_ids(vocabulary(a=0, b=1, c=2), vocabulary(**draft))


def test_real_tokenizers_agree_with_themselves(tokenizer):
    assert have_same_ids(tokenizer, tokenizer)


def test_a_tokenizer_survives_its_directory(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert have_same_ids(tokenizer, loaded)
    for chat in (False, True):
        assert encode(loaded, TEXTS["cjk"], chat) == encode(tokenizer, TEXTS["cjk"], chat)


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_directory_without_a_tokenizer_is_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(EasySpecError, match="has no usable tokenizer") as refusal:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refusal.value)


def test_plain_prompts_get_the_tokenizers_own_special_tokens(tokenizer):
    ids = encode(tokenizer, "the cat", chat=False)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.bos_token_id not in ids[1:]
    assert decode_text(tokenizer, ids) == "the cat"


def test_chats_get_the_special_tokens_of_the_template_and_no_others(tokenizer):
    ids = encode(tokenizer, "the cat", chat=True)
    assert tokenizer.decode(ids) == f"{BOS}[user]the cat{EOS}[bot]"
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1


@pytest.mark.parametrize("chat", [False, True])
def test_an_empty_prompt_is_refused(tokenizer, chat):
    with pytest.raises(EasySpecError, match="the prompt is empty"):
        encode(tokenizer, "", chat)


def test_a_chat_needs_a_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(EasySpecError, match="no chat template; give plain text"):
        encode(tokenizer, "the cat", chat=True)


def test_a_prompt_that_becomes_no_tokens_is_refused():
    def silent(text: str, **options: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[])

    with pytest.raises(EasySpecError, match="has no tokens"):
        encode(silent, "\u200b", chat=False)


def test_words_are_banned_as_vllm_bans_them():
    """As at the beginning of a text, and after a blank if that changes only the first token."""
    ids = {"cat": [1, 2], " cat": [3, 2], "dog": [4], " dog": [5, 4], "emu": [6], " emu": [6]}

    def tokenizer(text, add_special_tokens, verbose):
        assert not add_special_tokens
        return SimpleNamespace(input_ids=ids.get(text, []))

    stand_in: Any = tokenizer
    banned = bad_words_ids(stand_in, ["cat", " dog", "emu"])
    assert banned == [(1, 2), (3, 2), (4,), (6,)]
    with pytest.raises(EasySpecError, match="`bad_words` 'x' has no tokens"):
        bad_words_ids(stand_in, ["x"])
    with pytest.raises(EasySpecError, match=r"`bad_words` '.*ud800' is not valid Unicode"):
        bad_words_ids(stand_in, ["\ud800"])


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% if %}", "{{ messages[7]['role'] }}"]
)
def test_a_template_that_fails_is_one_line(template):
    broken = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE()), chat_template=template
    )
    with pytest.raises(EasySpecError, match="chat template fails") as refusal:
        encode(broken, "hello", chat=True)
    assert "\n" not in str(refusal.value)


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(EasySpecError, match="not valid Unicode"):
        encode(tokenizer, "a\udcffb", chat=False)


def test_a_text_longer_than_the_tokenizer_expects_is_no_warning(tokenizer, caplog):
    """No warning appears about the length; callers check the number of ids."""
    short = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, model_max_length=4
    )
    with caplog.at_level("WARNING"):
        assert len(encode(short, "the cat sat on the mat", chat=False)) > 4
    assert not caplog.records


def test_a_conversation_goes_through_the_template(tokenizer):
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    ids = encode(tokenizer, [*turns, {"role": "user", "content": "on"}])
    assert tokenizer.decode(ids) == f"{BOS}[user]the cat{EOS}[assistant]sat{EOS}[user]on{EOS}[bot]"
    with pytest.raises(EasySpecError, match="the prompt is empty"):
        encode(tokenizer, [*turns, {"role": "user", "content": ""}])


CORPUS = [
    "hello world, how are you doing? def main(): return 12345 if x else 'y'\n",
    TEXTS["cjk"],
    TEXTS["accents"],
]
SAMPLES = [
    *TEXTS.values(),
    "hello world 12345",
    "  hello  ",
    "it's DON'T",
    "a</s>b<s>",
    "<|im_end|> hello",
    "\u0301e",
]
SPLIT = Regex(r"\p{N}{1,3}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+")
CLASSES = [
    "Qwen2Tokenizer",
    "LlamaTokenizerFast",
    "LlamaTokenizer",
    "PreTrainedTokenizerFast",
    "GPT2Tokenizer",
    "GemmaTokenizer",
    "TokenizersBackend",
    "Nonsense",
    None,
]


def random_file(chance: random.Random) -> Tokenizer:
    """Make a tokenizer.json: byte-level or sentencepiece, with any steps around the BPE."""
    special = ["<unk>", "<s>", "</s>", "<|im_end|>"]
    if chance.random() < 0.5:
        file = Tokenizer(models.BPE(ignore_merges=chance.random() < 0.3))
        splits = chance.choice(
            [[], [pre_tokenizers.Digits(True)], [pre_tokenizers.Split(SPLIT, "isolated")]]
        )
        own = pre_tokenizers.ByteLevel(add_prefix_space=chance.random() < 0.2, use_regex=not splits)
        file.pre_tokenizer = pre_tokenizers.Sequence([*splits, own])
        file.normalizer = chance.choice([None, normalizers.NFC(), normalizers.Sequence([])])
        file.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        file = Tokenizer(
            models.BPE(unk_token="<unk>", byte_fallback=chance.random() < 0.8, fuse_unk=True)
        )
        spelling = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        if chance.random() < 0.5:
            steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
            file.normalizer = normalizers.Sequence(steps[chance.randint(0, 1) :])
            file.pre_tokenizer = None
            file.decoder = decoders.Sequence([*spelling, decoders.Strip(" ", 1, 0)])
        else:
            scheme = chance.choice(["first", "always", "never"])
            file.pre_tokenizer = pre_tokenizers.Metaspace(
                prepend_scheme=scheme, split=chance.random() < 0.5
            )
            file.decoder = chance.choice(
                [decoders.Metaspace(prepend_scheme=scheme), decoders.Sequence(spelling)]
            )
        alphabet = []
    size = 300 + chance.randint(20, 120)
    file.train_from_iterator(
        CORPUS * 3,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    file = Tokenizer.from_str(json.dumps(_with_plain_bytes(json.loads(file.to_str()))))
    bos, eos = [("<s>", 1)], [("</s>", 2)]
    file.post_processor = chance.choice(
        [
            None,
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", special_tokens=bos),
            processors.TemplateProcessing(single="$A </s>", special_tokens=eos),
            processors.Sequence(
                [
                    processors.ByteLevel(),
                    processors.TemplateProcessing(single="<s> $A", special_tokens=bos),
                ]
            ),
        ]
    )
    if chance.random() < 0.3:
        file.enable_truncation(chance.randint(1, 8))
    if chance.random() < 0.3:
        file.enable_padding(length=chance.choice([None, 40]))
    return file


def _with_plain_bytes(data: dict[str, Any]) -> dict[str, Any]:
    """Make bytes ordinary entries of the vocabulary, as in sentencepiece."""
    return data | {
        "added_tokens": [
            token for token in data["added_tokens"] if not token["content"].startswith("<0x")
        ]
    }


def random_configuration(chance: random.Random) -> dict[str, Any]:
    """Make a tokenizer_config.json with class names that must not matter."""
    fields = {
        "tokenizer_class": chance.choice(CLASSES),
        "add_bos_token": chance.choice([True, True, False, None]),
        "add_eos_token": chance.choice([True, False]),
        "add_prefix_space": chance.choice([True, False]),
        "bos_token": chance.choice(
            ["<s>", {"__type": "AddedToken", "content": "<s>", "normalized": False}]
        ),
        "eos_token": chance.choice(["</s>", "<|im_end|>"]),
        "unk_token": "<unk>",
        "legacy": chance.choice([True, False]),
        "clean_up_tokenization_spaces": chance.choice([True, False]),
        "model_max_length": chance.choice([4, 10**30]),
        "use_default_system_prompt": False,
        "sp_model_kwargs": {},
        "extra_special_tokens": chance.choice([[], ["<|im_end|>"]]),
    }
    return {
        name: value for name, value in fields.items() if value is not None and chance.random() < 0.7
    }


@pytest.mark.parametrize("seed", range(8))
def test_ids_and_text_are_those_of_the_tokenizers_file(tmp_path, seed):
    """8 × 26 = 208 tokenizers, compared with the tokenizers library itself."""
    chance, with_bos = random.Random(seed), 0
    for number in range(26):
        directory = tmp_path / str(number)
        directory.mkdir()
        file, config = random_file(chance), random_configuration(chance)
        file.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        model_type = chance.choice(["llama", "qwen2", "qwen3", "mistral"])
        (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
        opened = load_tokenizer(directory)
        file.no_truncation()
        file.no_padding()
        begins = config.get("add_bos_token") is True and "bos_token" in config
        for text in SAMPLES:
            inner = file.encode(text, add_special_tokens=False).ids
            assert opened(text, add_special_tokens=False).input_ids == inner, (config, text)
            expected = file.encode(text).ids
            if begins and expected[:1] != [1]:
                expected, with_bos = [1, *expected], with_bos + 1
            assert encode(opened, text) == expected, (config, text)
            assert decode_text(opened, expected) == file.decode(expected), (config, text)
    assert with_bos > 0  # else the flag was never the one that decided


def test_ids_are_those_that_transformers_gives_where_it_reads_the_file(tmp_path):
    chance = random.Random(99)
    for number in range(20):
        directory = tmp_path / str(number)
        directory.mkdir()
        file, config = random_file(chance), random_configuration(chance)
        config.pop("add_bos_token", None)  # which transformers 5 ignores next to a tokenizer.json
        file.save(str(directory / "tokenizer.json"))
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        opened, theirs = (
            load_tokenizer(directory),
            PreTrainedTokenizerFast.from_pretrained(directory),
        )
        assert (opened.bos_token, opened.eos_token) == (theirs.bos_token, theirs.eos_token)
        for text in SAMPLES:
            ids = theirs(text, padding=False, truncation=False).input_ids
            assert encode(opened, text) == ids
            assert decode_text(opened, ids) == decode_text(theirs, ids)


def saved(directory: Path, file: Tokenizer, **config: Any) -> Path:
    file.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def plain_file(*tokens: str) -> Tokenizer:
    """Make a tokenizer.json of single letters and given tokens, none of them special."""
    vocab = {
        token: number for number, token in enumerate([*"abcdefghijklmnopqrstuvwxyz ", *tokens])
    }
    file = Tokenizer(models.BPE(vocab, []))
    file.decoder = decoders.Fuse()
    return file


def test_a_token_that_the_configuration_names_is_special(tmp_path):
    """Fine-tunes may name an end of turn that is an ordinary token in tokenizer.json."""
    opened = load_tokenizer(saved(tmp_path, plain_file("<|im_end|>"), eos_token="<|im_end|>"))
    assert encode(opened, "ab<|im_end|>") == [0, 1, 27]
    assert decode_text(opened, [0, 27, 1]) == "ab"


def test_tokens_that_only_the_configuration_has_get_the_ids_that_it_says(tmp_path):
    added = {
        "27": {"content": "<tool>", "special": False},
        "28": {"content": "<end>", "special": True},
    }
    opened = load_tokenizer(saved(tmp_path, plain_file(), added_tokens_decoder=added))
    assert encode(opened, "a<tool>b<end>") == [0, 27, 1, 28]
    assert decode_text(opened, [0, 27, 1, 28]) == "a<tool>b"
    saved(
        tmp_path, plain_file(), added_tokens_decoder={"30": {"content": "<end>", "special": True}}
    )
    with pytest.raises(
        EasySpecError, match=r"'<end>' has the id 30 in the tokenizer's configuration, but .* 27"
    ):
        load_tokenizer(tmp_path)
    saved(tmp_path, plain_file())
    (tmp_path / "added_tokens.json").write_text('{"<old>": 27}')
    assert encode(load_tokenizer(tmp_path), "a<old>") == [0, 27]


def test_a_library_that_reads_a_file_differently_is_refused(tmp_path, monkeypatch):
    directory = saved(tmp_path, plain_file())
    call = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast,
        "__call__",
        lambda self, text, **options: call(self, text.lower(), **options),
    )
    with pytest.raises(EasySpecError, match="is read differently by transformers"):
        load_tokenizer(directory)


def test_chat_templates_come_from_the_file_before_the_configuration(tmp_path):
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    assert load_tokenizer(saved(tmp_path, plain_file(), chat_template="one")).chat_template == "one"
    assert load_tokenizer(saved(tmp_path, plain_file(), chat_template=named)).chat_template == {
        "default": "one",
        "tool_use": "two",
    }
    (tmp_path / "chat_template.jinja").write_text("three")
    assert (
        load_tokenizer(saved(tmp_path, plain_file(), chat_template="one")).chat_template == "three"
    )
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("four")
    assert load_tokenizer(tmp_path).chat_template == {"default": "three", "tool_use": "four"}


TOOL = {"content": "<tool>", "special": True}
ROLES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "none": ({}, None),
    "a role": ({"eos_token": "<tool>"}, None),
    "a role of its own": ({"tool_token": "<tool>"}, None),
    "declared": ({"added_tokens_decoder": {"27": TOOL}}, None),
    "declared as text": ({"added_tokens_decoder": {"27": TOOL | {"special": False}}}, None),
    "declared as text, with a role": (
        {"eos_token": "<tool>", "added_tokens_decoder": {"27": TOOL | {"special": False}}},
        None,
    ),
    "extra": ({"extra_special_tokens": ["<tool>"]}, None),
    "extra by name": ({"extra_special_tokens": {"tool_token": "<tool>"}}, None),
    "additional": ({"additional_special_tokens": ["<tool>"]}, None),
    "additional, declared as text": (
        {
            "additional_special_tokens": ["<tool>"],
            "added_tokens_decoder": {"27": TOOL | {"special": False}},
        },
        None,
    ),
    "map": ({"eos_token": "z"}, {"eos_token": "<tool>"}),
    "map that is too old": (
        {"eos_token": "z", "added_tokens_decoder": {}},
        {"eos_token": "<tool>"},
    ),
    "additional in a map": ({}, {"additional_special_tokens": ["<tool>"]}),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("roles", ROLES)
def test_a_token_is_special_where_transformers_takes_it_for_special(tmp_path, roles, known):
    file, (config, special_tokens_map) = plain_file("<tool>"), ROLES[roles]
    if known:
        file.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    saved(tmp_path, file, **config)
    if special_tokens_map is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))
    opened, theirs = load_tokenizer(tmp_path), PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert opened.eos_token == theirs.eos_token
    for text in ("x<tool>y", "x <tool>", "z"):
        assert opened(text).input_ids == theirs(text).input_ids
    assert decode_text(opened, [23, 27, 24]) == decode_text(theirs, [23, 27, 24])


def test_bos_goes_in_front_of_what_the_post_processor_writes(tmp_path):
    file = plain_file("<s>", "<c>")
    file.post_processor = processors.TemplateProcessing(
        single="<c> $A <c>", special_tokens=[("<c>", 28)]
    )
    opened = load_tokenizer(saved(tmp_path, file, bos_token="<s>", add_bos_token=True))
    assert encode(opened, "ab") == [27, 28, 0, 1, 28]


def test_a_post_processor_that_panics_is_one_line(tmp_path):
    data = json.loads(plain_file("<c>").to_str())
    piece = {"SpecialToken": {"id": "<gone>", "type_id": 0}}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece],
        "pair": [piece],
        "special_tokens": {},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(EasySpecError, match="has no usable tokenizer"):
        load_tokenizer(tmp_path)
