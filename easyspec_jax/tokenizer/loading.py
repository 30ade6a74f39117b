"""Tokenizers: opening one, checking that two agree, and encoding prompts. `text` goes back from ids to text."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as TokenizerFile

from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.tokenizer.conversation import (
    Prompt,
    Tokenizer,
    check_text,
    conversation_of,
    from_template,
)
from easyspec_jax.tokenizer.stream import decode_text

LARGEST_FILE = 256 << 20
"""Bytes of any file of a tokenizer; those of large vocabularies have 40 MiB."""

_FILE = "tokenizer.json"

_NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")

PROBE = (
    "Hello world, it's 12345.67 — don't  stop!\n\tdef f(x): return x_1+2 # Ünïcödé ﬁ Å\r\n\n"
    "中文分詞，日本語。 한국어 русский العربية हिन्दी 👩‍👩‍👧 ½ ² ABCdef HTTPServer 1,000  \u00a0end "
)
"""Text on which libraries that read one tokenizer.json differently are likely to differ."""


def quiet_transformers() -> None:
    """Keep transformers from warning, where there is no torch, that it has no models: none are wanted."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def load_tokenizer(directory: Path) -> Tokenizer:
    """Open the tokenizer of a checkpoint directory, offline and without running its code.

    A `tokenizer.json` is taken at its word: class names and model types choose nothing, as they do in AutoTokenizer.
    `tokenizer_config.json` and its companions add what they name: special tokens, chat templates, and with
    `add_bos_token` a BOS where the file's own post-processor writes none. Code that a configuration names (`auto_map`)
    is never imported.

    Raises:
        EasySpecError: There is no tokenizer, its files are damaged, unreasonably large or contradict each other, or
            the installed transformers gives other ids or text than `tokenizer.json` itself.
    """
    for pattern in ("*.json", "*.jinja", "*.txt", "tokenizer*", "additional_chat_templates/*"):
        for path in filter(Path.is_file, directory.glob(pattern)):
            if path.stat().st_size > LARGEST_FILE:
                raise EasySpecError(
                    f"{path} is larger than the {LARGEST_FILE >> 20} MiB of any proper one"
                )
    quiet_transformers()
    try:
        if (directory / _FILE).is_file():
            return _from_file(directory)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        _ = tokenizer.backend_tokenizer  # without one, ids cannot be decoded piece by piece
        return tokenizer
    except EasySpecError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # whatever the libraries raise for a broken tokenizer, Rust's panics included
        raise EasySpecError(f"{directory} has no usable tokenizer: {first_line(error)}") from None


def _from_file(directory: Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    PreTrainedTokenizerFast.from_pretrained would do much of this, but it imports torch where there is one, and ignores
    `add_bos_token`.
    """
    from transformers import PreTrainedTokenizerFast

    file = TokenizerFile.from_file(str(directory / _FILE))
    file.no_truncation()
    file.no_padding()
    ids = file.encode(PROBE, add_special_tokens=False).ids
    text = file.decode(ids, skip_special_tokens=True)
    config = _read_configuration(directory)
    named = _named_tokens(config)
    _add_declared(file, directory, config, named)
    special = {name: named[name] for name in _NAMED if name in named}
    if config.get("add_bos_token") is True and "bos_token" in special:
        _add_bos(file, str(special["bos_token"]))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=file,
        chat_template=_chat_templates(directory, config),
        clean_up_tokenization_spaces=False,
        split_special_tokens=config.get("split_special_tokens") is True,
        **special,
    )
    file.encode(PROBE)  # a damaged post-processor panics here rather than at the first prompt
    again = tokenizer(PROBE, add_special_tokens=False, verbose=False).input_ids
    if list(again) != ids or decode_text(tokenizer, ids) != text:
        import transformers

        raise EasySpecError(
            f"{directory / _FILE} is read differently by transformers {transformers.__version__}; "
            "install another version of it"
        )
    return tokenizer


def _read_configuration(directory: Path) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`.

    Without an `added_tokens_decoder` it is of an older kind, which two further files complete, as in transformers.
    """
    config = _read_optional(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    added = _read_optional(directory / "added_tokens.json")
    declared = {str(number): {"content": token} for token, number in added.items()}
    return (
        config
        | _read_optional(directory / "special_tokens_map.json")
        | {"added_tokens_decoder": declared}
    )


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _named_tokens(config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """The tokens that the configuration gives a role, such as `bos_token` or a model's own `tool_token`."""
    further = config.get("extra_special_tokens")
    roles = dict(config) | (further if isinstance(further, dict) else {})
    tokens = {
        name: _token(entry)
        for name, entry in roles.items()
        if name.endswith("_token") or name not in config
    }
    return {name: token for name, token in tokens.items() if token is not None}


def _token(entry: Any) -> AddedToken | None:
    """A token as the files write it: its text, or an object with that and flags."""
    if isinstance(entry, str) and entry:
        return AddedToken(entry, special=True, normalized=False)
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("content"), str)
        or not entry["content"]
    ):
        return None
    flags = {name: entry[name] for name in _FLAGS if isinstance(entry.get(name), bool)}
    return AddedToken(entry["content"], special=True, **({"normalized": False} | flags))


def _add_declared(
    file: TokenizerFile, directory: Path, config: Mapping[str, Any], named: Mapping[str, AddedToken]
) -> None:
    """Add the tokens that only the configuration has, and make those special that it gives a role.

    Raises:
        EasySpecError: A token that `tokenizer.json` lacks would get another id than the one declared for it.
    """
    roles = {str(token) for token in named.values()}
    for number, token in _declared_tokens(config):
        token.special = token.special or str(token) in roles
        lacking = file.token_to_id(str(token)) is None
        _add(file, token)
        if lacking and file.token_to_id(str(token)) != number:
            raise EasySpecError(
                f"{directory}: {str(token)!r} has the id {number} in the tokenizer's configuration, where "
                f"{_FILE} leaves it {file.token_to_id(str(token))}; save the tokenizer again"
            )
    for token in named.values():
        _add(file, token)
    further = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    added = {token.content for token in file.get_added_tokens_decoder().values()}
    for entry in further if isinstance(further, list) else ():
        token = _token(entry)
        if token is not None and str(token) not in added:
            _add(file, token)


def _add(file: TokenizerFile, token: AddedToken) -> None:
    """Have texts split at a token, and make it special if it is; a token that is so already stays as it is."""
    known = {token.content: token.special for token in file.get_added_tokens_decoder().values()}
    if token.special and not known.get(str(token)):
        file.add_special_tokens([token])
    elif str(token) not in known:
        file.add_tokens([token])


def _declared_tokens(config: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """The tokens of `added_tokens_decoder` in order of their ids."""
    entries = config["added_tokens_decoder"]
    declared: list[tuple[int, AddedToken]] = []
    for number, entry in entries.items() if isinstance(entries, dict) else ():
        token = _token(entry)
        if token is not None:
            token.special = isinstance(entry, dict) and entry.get("special") is True
            declared.append((int(number), token))
    return sorted(declared, key=lambda pair: pair[0])


def _add_bos(file: TokenizerFile, bos: str) -> None:
    """Have texts begin with BOS, in front of what the post-processor writes around them, unless that begins so."""
    number, inner, whole = (
        file.token_to_id(bos),
        file.encode(PROBE, add_special_tokens=False).ids,
        file.encode(PROBE).ids,
    )
    if number is None or not inner or whole[:1] == [number]:
        return
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    before = [bos, *(str(file.id_to_token(i)) for i in whole[:start])]
    after = [str(file.id_to_token(i)) for i in whole[start + len(inner) :]]
    file.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, "$B:1"],
        special_tokens=[
            (token, file.token_to_id(token)) for token in dict.fromkeys([*before, *after])
        ],
    )


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """The chat template, or several by name; files of their own come before the configuration's entries."""
    entries = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(entries, str):
        templates["default"] = entries
    for entry in entries if isinstance(entries, list) else ():
        templates[entry["name"]] = entry["template"]
    paths = [
        (path.stem, path) for path in sorted(directory.glob("additional_chat_templates/*.jinja"))
    ]
    for name, path in [*paths, ("default", directory / "chat_template.jinja")]:
        if path.is_file():
            templates[name] = path.read_text(encoding="utf-8")
    return templates.get("default") if templates.keys() <= {"default"} else templates


def check_same_ids(target: Tokenizer, draft: Tokenizer) -> None:
    """Check that every token that both tokenizers know has one id, and every id one token.

    Special tokens may differ in name, as between Llama 3 and 3.1: the target verifies them like any other.

    Raises:
        EasySpecError: Names the first token or id for which that is not so.
    """
    of_target, of_draft = target.get_vocab(), draft.get_vocab()
    by_id = {number: token for token, number in of_target.items()}
    special = _special_ids(target), _special_ids(draft)
    for token, number in of_draft.items():
        other = of_target.get(token, number)
        if other != number and not (other in special[0] and number in special[1]):
            raise EasySpecError(
                f"target and draft give {token!r} different token ids ({other} and {number}); "
                "choose a draft of the target's family"
            )
        if by_id.get(number, token) != token and not (
            number in special[0] and number in special[1]
        ):
            raise EasySpecError(
                f"target and draft give token id {number} to different tokens ({by_id[number]!r} and {token!r}); "
                "choose a draft of the target's family"
            )


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def encode(tokenizer: Tokenizer, prompt: Prompt, chat: bool = False) -> list[int]:
    """Turn a prompt into ids: a conversation through the chat template, text with the tokenizer's special tokens.

    Args:
        tokenizer: The target's.
        prompt: Text, messages or a Conversation.
        chat: Take text as a conversation of one user message.

    Raises:
        EasySpecError: The prompt is empty, not valid Unicode or not a conversation, or there is no chat template.
    """
    if isinstance(prompt, str):
        check_text(prompt)
        if not chat:
            return _ids(tokenizer, prompt, special=True)
        prompt = [{"role": "user", "content": prompt}]
    return _ids(tokenizer, from_template(tokenizer, conversation_of(prompt)), special=False)


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    if not ids:
        raise EasySpecError(f"the prompt {text[:40]!r} has no tokens")
    return list(ids)
