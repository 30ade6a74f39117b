"""Tokenizers that disagree are refused, prompts become ids once, and text streams out in whole characters."""

import random
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from easyspec_jax.errors import EasySpecError
from easyspec_jax.tokenizer import TextStream, check_same_ids, decode_text, encode, load_tokenizer

BOS, EOS = "<|bos|>", "<|eos|>"
TEMPLATE = (
    BOS + "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}" + EOS + "{% endfor %}[bot]"
)
TEXTS = {
    "ascii": "the cat sat on the mat",
    "accents": "Señor Łukasz naïvely ate crème brûlée",
    "cjk": "中文分詞很有意思，日本語もそうです。",
    "emoji": "ok 👍🏽 👩‍👩‍👧‍👦 done 🏴󠁧󠁢󠁳󠁣󠁴󠁿",
    "replacement": "a real \ufffd in the text\ufffd",
    "lines": "one\n\n  two\t three \r\n",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tiny byte-level BPE whose merges cross characters, so that tokens end inside of them; plain text gets a BOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([TEXTS["cjk"], TEXTS["ascii"]] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=True,
    )


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
    check_same_ids(target, vocabulary(**draft))
    check_same_ids(vocabulary(**draft), target)


def test_special_tokens_may_be_renamed_and_moved():
    """As between Llama 3, a common target, and Llama 3.2, whose small models are its drafts."""
    target = vocabulary(special=("eot", "reserved_2", "reserved_3"), a=0, eot=9, reserved_2=4, reserved_3=5)
    draft = vocabulary(special=("eot", "pad", "reserved_2"), a=0, eot=9, pad=4, reserved_2=5)
    check_same_ids(target, draft)
    check_same_ids(draft, target)
    with pytest.raises(EasySpecError):
        check_same_ids(target, vocabulary(special=("eot",), a=0, eot=9, pad=4))


@pytest.mark.parametrize(
    ("draft", "complaint"),
    [
        pytest.param({"a": 0, "b": 2, "d": 1}, "'b' different token ids (1 and 2)", id="differing id"),
        pytest.param({"a": 0, "x": 1}, "id 1 to different tokens ('b' and 'x')", id="shared id"),
        pytest.param({"c": 5}, "'c' different token ids (2 and 5)", id="id unknown to the target"),
    ],
)
def test_a_token_with_two_ids_or_an_id_with_two_tokens_is_refused(draft, complaint):
    with pytest.raises(EasySpecError) as refusal:
        check_same_ids(vocabulary(a=0, b=1, c=2), vocabulary(**draft))
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_real_tokenizers_agree_with_themselves(tokenizer):
    check_same_ids(tokenizer, tokenizer)


def test_a_tokenizer_survives_its_directory(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    check_same_ids(tokenizer, loaded)
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
    with pytest.raises(EasySpecError, match="no chat template; leave out --chat"):
        encode(tokenizer, "the cat", chat=True)


def test_a_prompt_that_becomes_no_tokens_is_refused():
    def silent(text: str, **options: bool) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[])

    with pytest.raises(EasySpecError, match="has no tokens"):
        encode(silent, "\u200b", chat=False)


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
    pieces = [decode_text(tokenizer, [i]) for i in encode(tokenizer, TEXTS["cjk"] + TEXTS["emoji"], chat=False)]
    assert sum("\ufffd" in piece for piece in pieces) > 10  # else the tests of the stream prove nothing


def test_a_stream_that_breaks_off_inside_a_character_holds_it_back_to_the_end(tokenizer):
    ids = encode(tokenizer, "ab👍", chat=False)
    stream = TextStream(tokenizer)
    assert "".join(stream.push([i]) for i in ids[:-1]) == "ab"
    assert stream.rest() == "\ufffd"
    assert stream.push(ids[-1:]) == "👍"
    assert stream.rest() == ""


def test_spaces_are_left_as_they_are(tokenizer):
    text = "it 's here , he said ."  # what clean_up_tokenization_spaces would tidy, and so change text already shown
    assert decode_text(tokenizer, encode(tokenizer, text, chat=False)) == text


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{% if %}", "{{ messages[7]['role'] }}"])
def test_a_template_that_fails_is_one_line(template):
    broken = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), chat_template=template)
    with pytest.raises(EasySpecError, match="chat template fails") as refusal:
        encode(broken, "hello", chat=True)
    assert "\n" not in str(refusal.value)


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(EasySpecError, match="no valid Unicode"):
        encode(tokenizer, "a\udcffb", chat=False)


def test_a_text_longer_than_the_tokenizer_expects_is_no_warning(tokenizer, caplog):
    """Whoever asks for the ids checks their number."""
    short = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, model_max_length=4)
    with caplog.at_level("WARNING"):
        assert len(encode(short, "the cat sat on the mat", chat=False)) > 4
    assert not caplog.records


def test_a_conversation_goes_through_the_template(tokenizer):
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    ids = encode(tokenizer, [*turns, {"role": "user", "content": "on"}])
    assert tokenizer.decode(ids) == f"{BOS}[user]the cat{EOS}[assistant]sat{EOS}[user]on{EOS}[bot]"
    with pytest.raises(EasySpecError, match="the prompt is empty"):
        encode(tokenizer, [*turns, {"role": "user", "content": ""}])


@pytest.mark.parametrize("stop", [["mat"], ["cat", "on the"], ["t s", "at sat on"], ["the mat."], ["\n", "mat"]])
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
    assert not any(s in decode_text(tokenizer, stream.ids[:-1]) for s in stop)  # not one id more than it takes


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_stop_string_before_half_a_character_is_found_at_once(tokenizer, cut):
    """Whatever the ids that complete it say beside it; no id of an earlier push is ever taken back."""
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
        shown = "".join(stream.push(ids[i : i + longest]) for i in range(0, len(ids), longest) if not stream.stopped)
        assert shown + stream.rest() == text[:5]
