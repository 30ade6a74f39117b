"""Texts to fit on: their length, their source, and how the draft's own begin."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from easyspec_jax import EasySpecError, SamplingParams, SpeculativeConfig, open_model
from easyspec_jax.refit.texts import LENGTH, answer_prompts, opening, read_texts, write_texts
from easyspec_jax.tokenizer import load_tokenizer
from tests.support.models import byte_tokenizer


@pytest.mark.slow
def test_answers_to_prompts(draft):
    """Prompts and answers follow each other as plain decoding gives them, until they suffice."""
    prompts = ["a fox", "a much shorter fox"]
    engine = open_model(draft[0].directory, speculative=SpeculativeConfig(method="vanilla"))
    sampling = SamplingParams(0.8, seed=3, max_new_tokens=LENGTH)
    turns = [
        engine.generate(prompts, replace(sampling, seed=3 + 2 * turn), batch_size=2)
        for turn in range(10)
    ]
    expected = [id for turn in turns for done in turn for id in done.prompt_ids + done.token_ids]
    texts = answer_prompts(engine, prompts, 4, sampling, chat=False, vocabulary=300)
    assert texts.shape == (4, LENGTH)
    assert texts.ravel().tolist() == expected[: texts.size]
    with pytest.raises(EasySpecError, match="give more prompts, or a `temperature` above 0"):
        answer_prompts(engine, ["a fox"], 4, SamplingParams(), chat=False, vocabulary=300)


@pytest.mark.slow
def test_ids_that_the_draft_does_not_know_are_left_out(draft):
    """A target may have more ids than its draft."""
    engine = open_model(draft[0].directory, speculative=SpeculativeConfig(method="vanilla"))
    sampling = SamplingParams(0.8, seed=3)
    texts = answer_prompts(engine, ["a fox"], 4, sampling, chat=False, vocabulary=300)
    fewer = answer_prompts(engine, ["a fox"], 4, sampling, chat=False, vocabulary=200)
    assert texts.max() >= 200
    known = [token for token in texts.ravel().tolist() if token < 200]
    assert fewer.ravel()[: len(known)].tolist() == known


def test_a_file_becomes_texts_of_one_length(tmp_path):
    tokenizer = byte_tokenizer()
    (tmp_path / "text").write_text("x" * (4 * LENGTH + 10))
    texts = read_texts(tmp_path / "text", tokenizer, 5)
    assert texts.shape == (4, LENGTH) and texts.dtype == np.int32
    assert read_texts(tmp_path / "text", tokenizer, 3).shape == (3, LENGTH)
    (tmp_path / "text").write_text("x" * LENGTH)
    with pytest.raises(EasySpecError, match="at least 720"):
        read_texts(tmp_path / "text", tokenizer, 5)


def test_a_text_opens_where_a_question_would_stand(draft):
    tokenizer = load_tokenizer(draft[0].directory)
    assert opening(tokenizer) == [tokenizer.bos_token_id]
    tokenizer.chat_template = "{% for m in messages %}<bos>Q: {{ m['content'] }}<eos>{% endfor %}A:"
    ids = opening(tokenizer)
    assert tokenizer.decode(ids) == "<bos>Q: "


def test_a_template_that_leaves_no_room_is_refused(draft):
    """Rows with fewer tokens than none to write would never be done."""
    tokenizer = load_tokenizer(draft[0].directory)
    tokenizer.chat_template = (
        "{{ 'x' * 5000 }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(EasySpecError, match="leaves too little of a text of 240"):
        write_texts(mock.Mock(), tokenizer, 1, SamplingParams())
