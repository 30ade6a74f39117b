"""Building a Hugging Face tokenizer from the metadata of a GGUF file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from convert.gguf_fields import TOKEN_IDS
from convert.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer
from easyspec_jax.errors import EasySpecError
from easyspec_jax.tokenizer.conversation import end_of_turn_ids
from easyspec_jax.tokenizer.loading import PROBE, load_tokenizer, quiet_transformers
from easyspec_jax.tokenizer.stream import decode_text

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # values of `tokenizer.ggml.token_type`
_LONGEST_PIECE = 1000  # characters; sentencepiece trains with at most 16 by default
_BLANK = "\u2581"  # sentencepiece writes "▁" for a space


def build_tokenizer(metadata: Mapping[str, Any], origin: str) -> Any:
    """Build a transformers tokenizer that splits text as llama.cpp does.

    Args:
        metadata: The metadata of the file.
        origin: Names the file in error messages.

    Raises:
        EasySpecError: The tokenizer is damaged, or neither sentencepiece BPE nor byte-level BPE
            with a known pre-tokenizer.
    """
    kind = str(metadata.get("tokenizer.ggml.model", "(none)"))
    if kind not in _KINDS:
        raise EasySpecError(
            f"{origin}: tokenizer model {kind!r} is not supported, only gpt2 (byte-level BPE) and "
            "llama (sentencepiece); convert the model's Hugging Face directory instead"
        )
    quiet_transformers()
    from transformers import PreTrainedTokenizerFast

    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        kinds = metadata["tokenizer.ggml.token_type"]
        named = {name: tokens[metadata[key]] for name, key in TOKEN_IDS.items() if key in metadata}
        # Some files name an ordinary token as padding or unknown token. Made special, it would
        # vanish from texts that contain it, so only tokens that the file calls special are.
        hidden: dict[str, str] = {}
        for name, token in named.items():
            if kinds[metadata[TOKEN_IDS[name]]] in (_UNKNOWN, _CONTROL):
                hidden[name] = token
        return PreTrainedTokenizerFast(
            tokenizer_object=_KINDS[kind](metadata, named, origin),
            clean_up_tokenization_spaces=False,
            chat_template=metadata.get("tokenizer.chat_template"),
            **hidden,
        )
    except KeyError as missing:
        raise EasySpecError(
            f"{origin}: the tokenizer's {missing} is missing; fetch the file again"
        ) from None
    except EasySpecError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise EasySpecError(
            f"{origin}: the tokenizer is damaged ({error}); fetch the file again"
        ) from None


_ENDS = (
    "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>",
    "<end_of_turn>", "<end_of_utterance>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "</s>", "<eos>",
)  # fmt: skip


def further_ends(tokenizer: Any) -> list[int]:
    """Return the ids that end a text, besides those that the file's metadata names.

    These are the end of a turn in the chat template, and special tokens that are ends by their
    names, at which llama.cpp stops as well.
    """
    added = tokenizer.added_tokens_decoder.items()
    named = [number for number, token in added if token.special and token.content in _ENDS]
    return [*end_of_turn_ids(tokenizer), *named]


def check_saved(tokenizer: Any, directory: Path) -> None:
    """Check that a tokenizer that was saved to a directory is still the same when loaded.

    Raises:
        EasySpecError: A probe text gets other ids, or decodes differently.
    """
    saved = load_tokenizer(directory)
    ids = tokenizer(PROBE).input_ids
    if saved(PROBE).input_ids != ids or decode_text(saved, ids) != decode_text(tokenizer, ids):
        raise EasySpecError(
            "the tokenizer is not the same after it was saved; "
            "install another version of transformers"
        )


def _byte_level_bpe(
    metadata: Mapping[str, Any], named: Mapping[str, str], origin: str
) -> Tokenizer:
    """Build byte-level BPE, which splits texts by regular expressions and then applies merges."""
    pre = _pre_tokenizer(metadata, origin)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    model = models.BPE(vocab=_vocabulary(metadata), merges=merges, ignore_merges=pre.ignore_merges)
    tokenizer = Tokenizer(model)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    # ByteLevel turns each byte of a piece into one letter ("Ġ" for a space) before BPE, and the
    # decoder turns the letters back. The splits are done already, hence use_regex=False.
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special_tokens(tokenizer, metadata, named, add_bos=pre.add_bos)


def _pre_tokenizer(metadata: Mapping[str, Any], origin: str) -> PreTokenizer:
    name = metadata.get("tokenizer.ggml.pre", "(none)")
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise EasySpecError(
            f"{origin}: pre-tokenizer {name!r} is not supported; supported: {known}"
        )
    return PRE_TOKENIZERS[name]


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], named: Mapping[str, str], origin: str
) -> Tokenizer:
    """Build sentencepiece BPE, whose tokens include spaces and have scores instead of merges."""
    vocab = _vocabulary(metadata)
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    model = models.BPE(
        vocab=vocab,
        merges=_merges(vocab, dict(zip(tokens, scores, strict=True))),
        unk_token=named.get("unk_token"),
        fuse_unk=True,
        byte_fallback=True,  # an unknown character becomes the tokens of its bytes, "<0xE4>" ...
    )
    tokenizer = Tokenizer(model)
    steps: list[Any] = [normalizers.Replace(" ", _BLANK)]
    spelling: list[Any] = [decoders.Replace(_BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    # "Hi" is encoded as if it were " Hi", and the space is stripped again on the way back.
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(_BLANK))
        spelling.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(spelling)
    return _with_special_tokens(tokenizer, metadata, named, add_bos=True)


def _merges(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """List every way to join two tokens into a third, those of the best-scored token first."""
    # Sentencepiece joins the neighbours whose joint token has the best score. With merges in the
    # order of their results' scores, BPE does the same.
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for token in vocab:
        # A hostile file may have tokens of megabytes, whose splits would never end.
        for place in range(1, len(token) if len(token) <= _LONGEST_PIECE else 0):
            left, right = token[:place], token[place:]
            if left in vocab and right in vocab:
                found.append((-scores[token], vocab[left], vocab[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Return every token's id, without the unused ones, which only pad the embedding."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocab: dict[str, int] = {}
    for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind != _UNUSED and vocab.setdefault(token, number) != number:
            raise ValueError("two ids have the same token")
    return vocab


def _with_special_tokens(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], named: Mapping[str, str], add_bos: bool
) -> Tokenizer:
    """Add the tokens that are never split, and what every text begins and ends with."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    added: list[AddedToken] = []
    for token, kind in zip(tokens, kinds, strict=True):
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            special, strips = kind != _USER_DEFINED, _strips_blanks(metadata, token)
            added.append(AddedToken(token, special=special, normalized=False, rstrip=strips))
    tokenizer.add_tokens(added)
    template = _template(metadata, named, add_bos)
    if template is not None:
        tokenizer.post_processor = template
    return tokenizer


def _strips_blanks(metadata: Mapping[str, Any], token: str) -> bool:
    """Whether a token swallows the blanks after it, which no field of a file says."""
    # As llama.cpp does, and the models' own tokenizers.
    name = str(metadata.get("general.name", "")).lower()
    is_phi3 = "phi-3" in name or "phi3" in name
    return is_phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")


def _template(metadata: Mapping[str, Any], named: Mapping[str, str], add_bos: bool) -> Any:
    """Return a post-processor that adds BOS or EOS to texts; None if neither is wanted."""
    before = ["bos_token"] if metadata.get("tokenizer.ggml.add_bos_token", add_bos) else []
    after = ["eos_token"] if metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if not before and not after:
        return None
    bos, eos = [named[token] for token in before], [named[token] for token in after]
    return processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *bos, "$B:1", *eos],
        special_tokens=[(named[token], metadata[TOKEN_IDS[token]]) for token in before + after],
    )


_KINDS: dict[str, Callable[[Mapping[str, Any], Mapping[str, str], str], Tokenizer]] = {
    "gpt2": _byte_level_bpe,
    "llama": _sentencepiece_bpe,
}
"""Builders by the value of `tokenizer.ggml.model`."""
