"""Tokenizers are what their files say, those that disagree are refused, and prompts become ids."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from easyspec_jax.errors import EasySpecError
from easyspec_jax.tokenizer import check_same_ids, decode_text, encode, load_tokenizer
from tests.models import BOS, EOS, TEXTS, trained_tokenizer


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
