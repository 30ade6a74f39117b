"""The demo pair's text: Python's standard library, its tokenizer and its packed token ids."""

import hashlib
import os
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LEFT_OUT = frozenset(
    {"encodings", "idlelib", "pydoc_data", "site-packages", "dist-packages", "test", "tests"}
)
"""Folders of tables, of tests and other text that is not library code, and of other packages."""

END_OF_TEXT = "<|endoftext|>"

# Words and punctuation carry the space before them. Line ends stand alone, because a prompt may
# well end in one.
_PIECES = r"\n+| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|[^\S\n]+(?=[^\S\n]\S)|[^\S\n]+"


@dataclass(frozen=True)
class Corpus:
    """Token ids of the files for training and of the files held out, uint16 [tokens].

    Attributes:
        heldout_bytes: The UTF-8 length of the files held out.
    """

    train: np.ndarray
    heldout: np.ndarray
    heldout_bytes: int


def library_files(root: Path | None = None) -> list[Path]:
    """List the library's modules in an order that does not depend on the file system."""
    files = []
    for folder, folders, names in os.walk(root or sysconfig.get_paths()["stdlib"]):
        folders[:] = set(folders) - LEFT_OUT
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def is_held_out(path: Path) -> bool:
    """Hold out one file in forty, by the digest of its name."""
    return hashlib.sha256(path.name.encode()).digest()[0] % 40 == 0


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose only special token ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def pack(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> np.ndarray:
    """Return the ids of all texts, each followed by the special token; uint16 [tokens]."""
    ids = tokenizer(list(texts), verbose=False).input_ids
    return np.asarray(
        [token for text in ids for token in (*text, tokenizer.eos_token_id)], np.uint16
    )


def build(directory: Path, vocab_size: int) -> Corpus:
    """Build the corpus and its tokenizer in a directory, or read them from it."""
    packed = directory / "corpus.npz"
    if not packed.exists():
        files = {
            path: path.read_text(encoding="utf-8", errors="replace") for path in library_files()
        }
        train = [text for path, text in files.items() if not is_held_out(path)]
        heldout = [text for path, text in files.items() if is_held_out(path)]
        tokenizer = train_tokenizer(train, vocab_size)
        tokenizer.save_pretrained(directory / "tokenizer")
        size = sum(len(text.encode()) for text in heldout)
        partial = directory / "partial.npz"
        np.savez(
            partial,
            train=pack(tokenizer, train),
            heldout=pack(tokenizer, heldout),
            heldout_bytes=size,
        )
        partial.rename(packed)
    with np.load(packed) as arrays:
        return Corpus(arrays["train"], arrays["heldout"], int(arrays["heldout_bytes"]))
