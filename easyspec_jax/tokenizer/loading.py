"""Tokenizers: open one, check that two agree, and encode prompts. `stream` decodes ids to text."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as TokenizerFile

from easyspec_jax.checkpoint.config import read_json
from easyspec_jax.errors import EasySpecError, first_line
from easyspec_jax.tokenizer.conversation import (
    Prompt,
    check_text,
    conversation_of,
    from_template,
)
from easyspec_jax.tokenizer.stream import Tokenizer, decode_text

LARGEST_FILE = 256 << 20
"""Largest file of a tokenizer that is read, in bytes; those of large vocabularies have 40 MiB."""

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
"""Text on which two libraries that read one tokenizer.json differently are likely to differ."""


def quiet_transformers() -> None:
    """Stop transformers from warning that it has no models without torch; none are needed."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def load_tokenizer(directory: Path) -> Tokenizer:
    """Open the tokenizer of a checkpoint directory, offline and without running its code.

    A `tokenizer.json` is followed to the letter; class names and model types, which steer
    AutoTokenizer, are ignored. `tokenizer_config.json` and its companions add special tokens, chat
    templates and, with `add_bos_token`, a BOS if the file's own post-processor adds none. Code
    named by the configuration (`auto_map`) is never imported.

    Args:
        directory: The checkpoint.

    Raises:
        EasySpecError: The directory has no tokenizer; its files are damaged, too large or
            contradictory; or the installed transformers gives other ids or text than
            `tokenizer.json` itself.

    Examples:
        >>> from easyspec_jax import demo
        >>> len(load_tokenizer(demo.TARGET))
        2048
    """
    for pattern in ("*.json", "*.jinja", "*.txt", "tokenizer*", "additional_chat_templates/*"):
        for path in filter(Path.is_file, directory.glob(pattern)):
            if path.stat().st_size > LARGEST_FILE:
                raise EasySpecError(
                    f"{path} is larger than {LARGEST_FILE >> 20} MiB, the limit for tokenizer files"
                )
    quiet_transformers()
    try:
        if (directory / _FILE).is_file():
            return _from_file(directory)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
        # Raises for a tokenizer written in Python, whose ids cannot be decoded piece by piece.
        _ = tokenizer.backend_tokenizer
        return tokenizer
    except EasySpecError:
        raise
    except (KeyboardInterrupt, SystemExit):
        raise
    # Libraries raise anything for a broken tokenizer. A panic in Rust is a BaseException.
    except BaseException as error:
        raise EasySpecError(f"{directory} has no usable tokenizer: {first_line(error)}") from None


def _from_file(directory: Path) -> Tokenizer:
    """Open the tokenizer of a `tokenizer.json`."""
    # PreTrainedTokenizerFast.from_pretrained would do much of this, but it imports torch if that
    # is installed, and ignores add_bos_token.
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
    # Some damaged post-processors panic only when used: better here than at the first prompt.
    file.encode(PROBE)
    again = tokenizer(PROBE, add_special_tokens=False, verbose=False).input_ids
    if list(again) != ids or decode_text(tokenizer, ids) != text:
        import transformers

        raise EasySpecError(
            f"{directory / _FILE} is read differently by transformers {transformers.__version__}; "
            "install another version of transformers"
        )
    return tokenizer


def _read_configuration(directory: Path) -> dict[str, Any]:
    """Return the contents of `tokenizer_config.json`, completed as transformers does."""
    config = _read_optional(directory / "tokenizer_config.json")
    if "added_tokens_decoder" in config:
        return config
    # Older directories keep the added tokens and the special ones in files of their own.
    declared: dict[str, Any] = {}
    for token, number in _read_optional(directory / "added_tokens.json").items():
        declared[str(number)] = {"content": token}
    special = _read_optional(directory / "special_tokens_map.json")
    return config | special | {"added_tokens_decoder": declared}


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _named_tokens(config: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Return the tokens with a role, such as `bos_token` or a model's own `tool_token`."""
    further = config.get("extra_special_tokens")
    roles = dict(config) | (further if isinstance(further, dict) else {})
    tokens: dict[str, AddedToken] = {}
    for name, entry in roles.items():
        token = _token(entry) if name.endswith("_token") or name not in config else None
        if token is not None:
            tokens[name] = token
    return tokens


def _token(entry: Any) -> AddedToken | None:
    """Parse a token: its text, or an object that has its text as `content`, and flags."""
    fields = entry if isinstance(entry, dict) else {"content": entry}
    content = fields.get("content")
    if not isinstance(content, str) or not content:
        return None
    flags = {name: fields[name] for name in _FLAGS if isinstance(fields.get(name), bool)}
    return AddedToken(content, special=True, **({"normalized": False} | flags))


def _add_declared(
    file: TokenizerFile, directory: Path, config: Mapping[str, Any], named: Mapping[str, AddedToken]
) -> None:
    """Add the tokens that only the configuration has, and make those with a role special.

    Raises:
        EasySpecError: A token that `tokenizer.json` lacks would get another id than is declared.
    """
    roles = set(map(str, named.values()))
    added = _is_special(file)
    for number, token in _declared_tokens(config):
        text = str(token)
        token.special = token.special or text in roles
        lacking = file.token_to_id(text) is None
        _add(file, added, token)
        # The library numbers new tokens in the order in which they are added. An id that is
        # skipped or taken would shift all later ones, and texts would come out as gibberish.
        given = file.token_to_id(text)
        if lacking and given != number:
            raise EasySpecError(
                f"{directory}: {text!r} has the id {number} in the tokenizer's configuration, "
                f"but {_FILE} gives it {given}; save the tokenizer again"
            )
    for token in named.values():
        _add(file, added, token)
    further = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    for entry in further if isinstance(further, list) else ():
        token = _token(entry)
        if token is not None and str(token) not in added:
            _add(file, added, token)


def _add(file: TokenizerFile, added: dict[str, bool], token: AddedToken) -> None:
    """Split texts at a token, and make it special if it says so; known ones stay as they are.

    Args:
        file: The tokenizer.
        added: Whether each of its added tokens is special. A model may have thousands, so the
            library is not asked again for each.
        token: The token.
    """
    text = str(token)
    if token.special and not added.get(text):
        file.add_special_tokens([token])
        added[text] = True
    elif text not in added:
        file.add_tokens([token])
        added[text] = False


def _is_special(file: TokenizerFile) -> dict[str, bool]:
    """Map every added token to whether it is special."""
    return {token.content: token.special for token in file.get_added_tokens_decoder().values()}


def _declared_tokens(config: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """Return the tokens of `added_tokens_decoder` in the order of their ids."""
    entries = config["added_tokens_decoder"]
    declared: list[tuple[int, AddedToken]] = []
    for number, entry in entries.items() if isinstance(entries, dict) else ():
        token = _token(entry)
        if token is not None:
            token.special = isinstance(entry, dict) and entry.get("special") is True
            declared.append((int(number), token))
    return sorted(declared, key=lambda pair: pair[0])


def _add_bos(file: TokenizerFile, bos: str) -> None:
    """Begin texts with BOS, before what the post-processor adds, unless they do already."""
    number = file.token_to_id(bos)
    inner = file.encode(PROBE, add_special_tokens=False).ids
    whole = file.encode(PROBE).ids
    if number is None or not inner or whole[:1] == [number]:
        return
    # Find out by example what the post-processor adds on either side, and write a new one:
    # whole = [*before, *inner, *after] becomes [bos, *before, *inner, *after].
    start = next(i for i in range(len(whole)) if whole[i : i + len(inner)] == inner)
    before = [bos, *map(str, map(file.id_to_token, whole[:start]))]
    after = list(map(str, map(file.id_to_token, whole[start + len(inner) :])))
    used = dict.fromkeys([*before, *after])
    file.post_processor = processors.TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, "$B:1"],
        special_tokens=[(token, file.token_to_id(token)) for token in used],
    )


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> str | dict[str, str] | None:
    """Return the chat template, or several by name. Files win over the configuration's entries."""
    entries = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(entries, str):
        templates["default"] = entries
    for entry in entries if isinstance(entries, list) else ():
        templates[entry["name"]] = entry["template"]
    further = sorted(directory.glob("additional_chat_templates/*.jinja"))
    for path in filter(Path.is_file, further):
        templates[path.stem] = path.read_text(encoding="utf-8")
    main = directory / "chat_template.jinja"
    if main.is_file():
        templates["default"] = main.read_text(encoding="utf-8")
    return templates.get("default") if templates.keys() <= {"default"} else templates


def have_same_ids(target: Tokenizer, draft: Tokenizer) -> bool:
    """Return whether every token that both tokenizers know has one id, and every id one token.

    Special tokens may differ in name, as between Llama 3 and 3.1: the target verifies them like any
    other.

    Args:
        target: The target's tokenizer.
        draft: The draft's tokenizer.
    """
    of_target, of_draft = target.get_vocab(), draft.get_vocab()
    by_id = {number: token for token, number in of_target.items()}
    target_special, draft_special = _special_ids(target), _special_ids(draft)
    for token, number in of_draft.items():
        other = of_target.get(token, number)
        if other != number and not (other in target_special and number in draft_special):
            return False
        renamed = number in target_special and number in draft_special
        if by_id.get(number, token) != token and not renamed:
            return False
    return True


def _special_ids(tokenizer: Tokenizer) -> set[int]:
    return {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def encode(tokenizer: Tokenizer, prompt: Prompt, chat: bool = False) -> list[int]:
    """Turn a prompt into token ids.

    A conversation goes through the chat template, which writes special tokens itself. Text gets
    those that the tokenizer adds, such as a BOS.

    Args:
        tokenizer: The target's.
        prompt: Text, messages or a Conversation.
        chat: Treat text as a conversation of one user message.

    Raises:
        EasySpecError: The prompt is empty, not valid Unicode or not a conversation, or the
            tokenizer has no chat template.

    Examples:
        >>> from easyspec_jax import demo
        >>> encode(load_tokenizer(demo.TARGET), "def f(x):")
        [314, 285, 8, 88, 298]
    """
    if isinstance(prompt, str):
        check_text(prompt)
        if not chat:
            return _ids(tokenizer, prompt, special=True)
        prompt = [{"role": "user", "content": prompt}]
    return _ids(tokenizer, from_template(tokenizer, conversation_of(prompt)), special=False)


def bad_words_ids(tokenizer: Tokenizer, words: Iterable[str]) -> list[tuple[int, ...]]:
    """Return the ids by which words are banned, as vLLM does.

    A word is banned as it is at the beginning of a text. If a blank before it changes its first
    token and nothing more, it is banned after a blank as well.

    Args:
        tokenizer: The tokenizer.
        words: The words.

    Raises:
        EasySpecError: A word has no tokens, or is not valid Unicode.
    """
    banned = []
    for word in words:
        try:
            word.encode("utf-8")
        except UnicodeEncodeError:
            raise EasySpecError(f"`bad_words` {word[:40]!r} is not valid Unicode") from None
        first, spaced = (
            tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
            for text in (word.lstrip(), " " + word.lstrip())
        )
        if not first:
            raise EasySpecError(f"`bad_words` {word[:40]!r} has no tokens")
        banned.append(first)
        if len(spaced) == len(first) and spaced[0] != first[0]:
            banned.append(spaced)
    return banned


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    if not ids:
        raise EasySpecError(f"the prompt {text[:40]!r} has no tokens; give other text")
    return list(ids)
