"""Builds a Hugging Face tokenizer from the tokenizer metadata of a GGUF file."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from convert.gguf_fields import TOKEN_IDS
from easyspec_jax.errors import EasySpecError

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 2, 3, 4, 5  # values of `tokenizer.ggml.token_type`


@dataclass(frozen=True)
class PreTokenizer:
    """What a `tokenizer.ggml.pre` means.

    splits: regular expressions, each applied to the pieces that the ones before it left. ignore_merges: a piece that
    is a token needs no merges. add_bos: texts begin with BOS unless the metadata says otherwise. nfc: Unicode is
    composed first.
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False
    nfc: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = PreTokenizer((_TIKTOKEN % "{1,3}",), ignore_merges=True, add_bos=True)

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    # llama.cpp's fallback, which is no model's own.
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": PreTokenizer((_GPT2,)),
    "llama-bpe": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": PreTokenizer((_TIKTOKEN % "",), nfc=True),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
}


def build_tokenizer(metadata: Mapping[str, Any], model_type: str, origin: str) -> Any:
    """A transformers tokenizer that splits text as llama.cpp does.

    Raises EasySpecError for any other kind than byte-level BPE with a known pre-tokenizer, or damaged metadata.
    """
    pre = _pre_tokenizer(metadata, model_type, origin)
    # Without torch the library warns that it has no models, and none are wanted.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast

    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        named = {token: tokens[metadata[key]] for token, key in TOKEN_IDS.items() if key in metadata}
        return PreTrainedTokenizerFast(
            tokenizer_object=_byte_level_bpe(metadata, pre, named),
            clean_up_tokenization_spaces=False,
            chat_template=metadata.get("tokenizer.chat_template"),
            **named,
        )
    except KeyError as missing:
        raise EasySpecError(f"{origin}: the tokenizer's {missing} is missing") from None
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise EasySpecError(f"{origin}: the tokenizer is damaged ({error})") from None


def _pre_tokenizer(metadata: Mapping[str, Any], model_type: str, origin: str) -> PreTokenizer:
    kind = metadata.get("tokenizer.ggml.model", "(none)")
    if kind != "gpt2":
        raise EasySpecError(
            f"{origin}: tokenizer model {kind!r} is not supported, only gpt2 (byte-level BPE); "
            "convert the model's Hugging Face directory instead"
        )
    name = metadata.get("tokenizer.ggml.pre", "(none)")
    # AutoTokenizer gives every qwen2 directory Qwen2's own splitting, whatever its tokenizer.json says.
    known = [pre for pre in sorted(PRE_TOKENIZERS) if not model_type.startswith("qwen") or PRE_TOKENIZERS[pre].nfc]
    if name not in known:
        raise EasySpecError(
            f"{origin}: pre-tokenizer {name!r} is not supported for {model_type}; supported: {', '.join(known)}"
        )
    return PRE_TOKENIZERS[name]


def _byte_level_bpe(metadata: Mapping[str, Any], pre: PreTokenizer, named: Mapping[str, str]) -> Tokenizer:
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    # Unused tokens pad the vocabulary to the embedding's rows; no text contains them.
    vocab = {token: id for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges))
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in pre.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind != _USER_DEFINED, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    template = _template(metadata, pre, named)
    if template is not None:
        tokenizer.post_processor = template
    return tokenizer


def _template(metadata: Mapping[str, Any], pre: PreTokenizer, named: Mapping[str, str]) -> Any:
    """What puts BOS before and EOS after a text, None where neither is wanted."""
    before = ["bos_token"] if metadata.get("tokenizer.ggml.add_bos_token", pre.add_bos) else []
    after = ["eos_token"] if metadata.get("tokenizer.ggml.add_eos_token", False) else []
    if not before and not after:
        return None
    bos, eos = [named[token] for token in before], [named[token] for token in after]
    return processors.TemplateProcessing(
        single=[*bos, "$A", *eos],
        pair=[*bos, "$A", *eos, *bos, "$B:1", *eos],
        special_tokens=[(named[token], metadata[TOKEN_IDS[token]]) for token in before + after],
    )
