"""The demo pair's text is the library's own, and its tokenizer cuts where prompts may end."""

import numpy as np
import pytest

from experiments.demo import demo_corpus

TEXTS = [
    'def area(radius):\n    """Of a circle."""\n    return 3.14 * radius ** 2\n\n\n' * 5,
    "class Räder:\n\tpass\n",
]


@pytest.fixture(scope="module")
def tokenizer():
    return demo_corpus.train_tokenizer(TEXTS, 320)


def test_the_library_without_tests_tables_and_other_peoples_packages():
    names = {path.name for path in demo_corpus.library_files()}
    assert {"argparse.py", "dataclasses.py", "threading.py"} <= names
    assert not {"cp1252.py", "regrtest.py", "topics.py"} & names
    assert not any("site-packages" in str(path) for path in demo_corpus.library_files())


def test_some_files_are_held_out_by_name_alone(tmp_path):
    files = demo_corpus.library_files()
    heldout = [path for path in files if demo_corpus.is_held_out(path)]
    assert 0.005 < len(heldout) / len(files) < 0.06
    assert all(demo_corpus.is_held_out(tmp_path / path.name) for path in heldout)


@pytest.mark.parametrize(
    "text", [*TEXTS, "\n\n  x = '日本 👍' \t\r\n# 12 + 3\n", "   ", "a  b   c"]
)
def test_every_text_survives_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("end", ["def area(radius):\n", "def area", "    return 3", "class Räder:"])
def test_a_prompt_may_end_with_a_word_a_digit_or_a_line(tokenizer, end):
    text = next(text for text in TEXTS if end in text)
    text = text[: text.index(end) + len(end) + 8]
    prompt = tokenizer(text[: text.index(end) + len(end)]).input_ids
    assert tokenizer(text).input_ids[: len(prompt)] == prompt


def test_texts_are_packed_with_an_end_after_each(tokenizer):
    packed = demo_corpus.pack(tokenizer, TEXTS)
    assert packed.dtype == np.uint16
    ends = np.flatnonzero(packed == tokenizer.eos_token_id)
    assert len(ends) == 2
    assert ends[-1] == len(packed) - 1
    assert tokenizer.decode(packed[: ends[0]].tolist()) == TEXTS[0]
