"""Builds a Hugging Face tokenizer from the tokenizer metadata of a GGUF file."""

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
from easyspec_jax.tokenizer.loading import PROBE, load_tokenizer, quiet_transformers
from easyspec_jax.tokenizer.stream import decode_text

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # values of `tokenizer.ggml.token_type`
_LONGEST_PIECE = 1000  # characters; sentencepiece trains with at most 16 by default


def build_tokenizer(metadata: Mapping[str, Any], origin: str) -> Any:
    """Build a transformers tokenizer that splits text as llama.cpp does.

    Args:
        metadata: The file's.
        origin: Names the file in error messages.

    Raises:
        EasySpecError: It is neither sentencepiece BPE nor byte-level BPE with a known pre-tokenizer, or is damaged.
    """
    kind = str(metadata.get("tokenizer.ggml.model", "(none)"))
    if kind not in _KINDS:
        raise EasySpecError(
            f"{origin}: tokenizer model {kind!r} is not supported, only gpt2 (byte-level BPE) and llama "
            "(sentencepiece); convert the model's Hugging Face directory instead"
        )
    quiet_transformers()
    from transformers import PreTrainedTokenizerFast

    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        kinds = metadata["tokenizer.ggml.token_type"]
        named = {
            token: tokens[metadata[key]] for token, key in TOKEN_IDS.items() if key in metadata
        }
        # Padding or the unknown token may be an ordinary one, which texts then contain.
        special = {
            token for token, kind in zip(tokens, kinds, strict=True) if kind in (_UNKNOWN, _CONTROL)
        }
        hidden = {name: token for name, token in named.items() if token in special}
        return PreTrainedTokenizerFast(
            tokenizer_object=_KINDS[kind](metadata, named, origin),
            clean_up_tokenization_spaces=False,
            chat_template=metadata.get("tokenizer.chat_template"),
            **hidden,
        )
    except KeyError as missing:
        raise EasySpecError(f"{origin}: the tokenizer's {missing} is missing") from None
    except EasySpecError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise EasySpecError(f"{origin}: the tokenizer is damaged ({error})") from None


def check_saved(tokenizer: Any, directory: Path) -> None:
    """Check that a tokenizer, saved to a directory, is read there as what it was.

    Raises:
        EasySpecError: It gives other ids or another text for a probe text.
    """
    saved = load_tokenizer(directory)
    ids = tokenizer(PROBE).input_ids
    if saved(PROBE).input_ids != ids or decode_text(saved, ids) != decode_text(tokenizer, ids):
        raise EasySpecError(
            "the tokenizer is not the same after it was saved; install another version of transformers"
        )


def _byte_level_bpe(
    metadata: Mapping[str, Any], named: Mapping[str, str], origin: str
) -> Tokenizer:
    """Byte-level BPE with merges, split by regular expressions first."""
    pre = _pre_tokenizer(metadata, origin)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    model = models.BPE(vocab=_vocabulary(metadata), merges=merges, ignore_merges=pre.ignore_merges)
    tokenizer = Tokenizer(model)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
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
    """Sentencepiece's BPE: blanks are part of tokens, rare characters are bytes, and tokens have scores, not merges."""
    vocab = _vocabulary(metadata)
    scores = dict(
        zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True)
    )
    unknown = named.get("unk_token")
    model = models.BPE(
        vocab=vocab,
        merges=_merges(vocab, scores),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    blank = "\u2581"
    steps: list[Any] = [normalizers.Replace(" ", blank)]
    spelling: list[Any] = [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend(blank))
        spelling.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = (
        normalizers.Sequence(steps),
        decoders.Sequence(spelling),
    )
    return _with_special_tokens(tokenizer, metadata, named, add_bos=True)


def _merges(vocab: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, the best-scored token first, as sentencepiece merges."""
    found: list[tuple[float, int, int, tuple[str, str]]] = []
    for token in vocab:
        for place in range(1, len(token) if len(token) <= _LONGEST_PIECE else 0):
            left, right = token[:place], token[place:]
            if left in vocab and right in vocab:
                found.append((-scores[token], vocab[left], vocab[right], (left, right)))
    return [pair for *_, pair in sorted(found)]


def _vocabulary(metadata: Mapping[str, Any]) -> dict[str, int]:
    """Every token's id. Unused tokens pad the vocabulary to the embedding's rows; no text contains them."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    used = [
        (token, id)
        for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind != _UNUSED
    ]
    vocab = dict(used)
    if len(vocab) < len(used):
        raise ValueError("two ids have the same token")
    return vocab


def _with_special_tokens(
    tokenizer: Tokenizer, metadata: Mapping[str, Any], named: Mapping[str, str], add_bos: bool
) -> Tokenizer:
    """The tokenizer, with the tokens that no text is split into, and what a text begins and ends with."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    template = _template(metadata, named, add_bos)
    if template is not None:
        tokenizer.post_processor = template
    return tokenizer


def _template(metadata: Mapping[str, Any], named: Mapping[str, str], add_bos: bool) -> Any:
    """What puts BOS before and EOS after a text, None where neither is wanted."""
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
"""Builders, by `tokenizer.ggml.model`."""
