"""Text to token ids and back, over the `tokenizers` library: from the fields of a GGUF file or from tokenizer.json.

Special tokens in a user's text stay text: a haystack that quotes `<|im_end|>` does not end the turn.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from lcx.errors import UserError
from lcx.pretrained.errors import CheckpointFormatError, LoadError
from lcx.pretrained.tokenizer_backends import (
    CONTROL,
    UNUSED,
    USER_DEFINED,
    byte_level,
    field,
    id_field,
    missing_bytes,
    sentencepiece,
)

SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
# the template as the model's files hold it; a file with another one gets no chat(), because lcx runs no templates
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SMOLLM2_SYSTEM
    + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ROLES = ("system", "user", "assistant")
MAX_IDS = 1 << 24


class Tokenizer:
    """Tokenizer of a model: encodes, decodes and formats chats.  `bos_id`, `eos_id` are None where the model has none.

    Attributes:
      bos_id: the token that the model was trained with in front of a text, None where there is none.
      eos_id: the first of `stop_ids`.
      stop_ids: every token that ends a text, in the order of the files that name them.
      add_bos: the model was trained with `bos_id` in front.  `encode` never adds it, `text_ids` does.
      has_text: bool [vocab_size], False for ids that stand for no text.  A model's embedding may be padded with such ids, within the
        vocabulary or beyond it: they are never proposed (`Pretrained.choose`), and decoding one is an error.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        path: str,
        bos_id: int | None,
        stop_ids: Sequence[int],
        add_bos: bool,
        template: str | None = None,
        padding: Iterable[int] = (),
    ):
        self.path, self.bos_id, self.add_bos = path, bos_id, add_bos
        self.stop_ids = tuple(dict.fromkeys(stop_ids))
        self.eos_id = self.stop_ids[0] if self.stop_ids else None
        self._backend, self._template = backend, template
        self._lock = threading.Lock()
        backend.no_padding()
        backend.no_truncation()
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(index for index, token in added.items() if token.special)
        self._missing = missing_bytes(backend)
        known = np.fromiter(backend.get_vocab(with_added_tokens=True).values(), np.int64)
        # ids may have gaps; a vocabulary of a stranger may have an id beyond any embedding
        if known.size == 0 or known.max() >= MAX_IDS:
            raise CheckpointFormatError(f"{path}: has no token, or an id of {MAX_IDS:,} or more")
        if len(np.unique(known)) < known.size:
            raise CheckpointFormatError(
                f"{path}: two tokens have one id; its added tokens do not follow its vocabulary"
            )
        self.has_text = np.zeros(int(known.max()) + 1, bool)
        self.has_text[known] = True
        self.has_text[list(padding)] = False
        if add_bos and bos_id is None:
            raise CheckpointFormatError(f"{path}: asks for a bos token in front of a text but names none")
        for name, index in (("bos_id", bos_id), *(("eos_id", index) for index in self.stop_ids)):
            if index is not None and not 0 <= index < self.vocab_size:
                raise CheckpointFormatError(f"{path}: {name}={index}, allowed are 0 to {self.vocab_size - 1}")

    @property
    def vocab_size(self) -> int:
        """Number of ids: the largest that `decode` knows, plus one.  A model's embedding may be padded beyond it."""
        return len(self.has_text)

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of a text as the model was trained to read it: bos in front where `add_bos`, then `encode(text)`."""
        return [*self.front, *self.encode(text)]

    @property
    def front(self) -> list[int]:
        """Return the ids in front of every text: bos, or none."""
        return [self.bos_id] if self.add_bos and self.bos_id is not None else []

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Return the token ids of a text, without a bos token in front.

        Args:
          text: any text.
          parse_special: turn `<|im_end|>` and the like into their special tokens; without it they stay ordinary text.

        Raises:
          UserError: a lone surrogate, or a character whose bytes this vocabulary lacks; it would vanish without a word.
        """
        try:
            present = set(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise UserError(f"text has the lone surrogate U+{ord(text[error.start]):04X} at {error.start:,}") from None
        if lost := present & self._missing:
            at = next(i for i, char in enumerate(text) if lost & set(char.encode("utf-8")))
            raise LoadError(f"text has U+{ord(text[at]):04X} at {at:,}, which the vocabulary of {self.path} lacks")
        # the switch belongs to the backend, not to the call
        with self._lock:
            self._backend.encode_special_tokens = not parse_special
            ids = self._backend.encode(text, add_special_tokens=False).ids
        if not parse_special and not self._special.isdisjoint(ids):
            special = self._backend.id_to_token(next(index for index in ids if index in self._special))
            raise LoadError(
                f"text becomes the special token {special!r} of {self.path}; remove it, or pass parse_special=True"
            )
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Return the text of token ids.  Bytes that are not UTF-8 become U+FFFD.

        Raises:
          UserError: an id is outside the vocabulary, or one of the padding, which stands for no text.
        """
        ids = [int(index) for index in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(index for index in ids if not 0 <= index < self.vocab_size)
            raise UserError(f"token id {wrong}, allowed are 0 to {self.vocab_size - 1}")
        if not self.has_text[ids].all():
            wrong = next(index for index in ids if not self.has_text[index])
            raise LoadError(f"token id {wrong} stands for no text: {self.path} pads its vocabulary with it")
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        """Return a decoder that takes one id at a time."""
        return StreamDecoder(self, skip_special)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation up to where the assistant speaks.  Special tokens inside messages stay text.

        Args:
          messages: [{"role": "user", "content": "..."}, ...]; roles are system, user and assistant.

        Raises:
          UserError: the model's chat format is unknown to lcx, or a message is not of this form.
        """
        if self._template != SMOLLM2_TEMPLATE:
            raise LoadError(
                f"chat format of {self.path} is unknown; allowed is SmolLM2's: format the text and use encode()"
            )
        if not messages:
            raise UserError("messages=[], allowed is at least one message")
        for message in messages:
            if (
                set(message) != {"role", "content"}
                or message["role"] not in ROLES
                or not isinstance(message["content"], str)
            ):
                raise UserError(
                    f"message {str(message)[:80]!r}; allowed is role ({', '.join(ROLES)}) and content, a text"
                )
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": SMOLLM2_SYSTEM}, *messages]
        marks = ("<|im_start|>", "<|im_end|>")
        start, end = (self.encode(mark, parse_special=True)[0] for mark in marks)
        newline = self.encode("\n")
        ids: list[int] = []
        for message in messages:
            ids += [start, *self.encode(f"{message['role']}\n{message['content']}"), end, *newline]
        return [*ids, start, *self.encode("assistant\n")]

    @classmethod
    def from_gguf(cls, fields: Mapping[str, object], path: str) -> Tokenizer:
        """Return the tokenizer in the `tokenizer.*` fields of a GGUF header.

        Raises:
          CheckpointFormatError: a field is missing or does not fit, or a tokenizer that lcx was not checked against.
        """
        tokens = field(fields, "tokens", list, path)
        kinds = fields.get("tokenizer.ggml.token_type")
        if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
            raise CheckpointFormatError(
                f"{path}: tokenizer.ggml.token_type must have {len(tokens):,} entries, one a token"
            )
        if repeated := len(tokens) - len(set(tokens)):
            raise CheckpointFormatError(f"{path}: tokenizer.ggml.tokens has {repeated:,} tokens twice")
        model = field(fields, "model", str, path)
        if model == "gpt2":
            backend = byte_level(fields, tokens, path)
        elif model == "llama":
            backend = sentencepiece(fields, tokens, kinds, path)
        else:
            raise CheckpointFormatError(f"{path}: tokenizer.ggml.model={model[:80]!r}, allowed are 'gpt2' and 'llama'")
        control = [tokens[i] for i in np.flatnonzero(kinds == CONTROL)]
        plain = [tokens[i] for i in np.flatnonzero(kinds == USER_DEFINED)]
        if "" in control or "" in plain:
            raise CheckpointFormatError(f"{path}: tokenizer.ggml.tokens has an empty special token")
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
        # as in llama.cpp: SentencePiece models and Llama 3's have a bos in front unless the file says otherwise
        add_bos = fields.get("tokenizer.ggml.add_bos_token")
        if add_bos is None:
            add_bos = model == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"
        elif not isinstance(add_bos, (bool, int)):
            raise CheckpointFormatError(f"{path}: tokenizer.ggml.add_bos_token must be true or false")
        stops = [id_field(fields, f"{name}_token_id", path) for name in ("eos", "eot", "eom")]
        template = fields.get("tokenizer.chat_template")
        # converters give these names to the rows of a padded embedding
        padding = [int(i) for i in np.flatnonzero(kinds == UNUSED) if tokens[i] == f"[PAD{i}]"]
        return cls(
            backend,
            path=path,
            bos_id=id_field(fields, "bos_token_id", path),
            stop_ids=[index for index in stops if index is not None],
            add_bos=bool(add_bos),
            template=template if isinstance(template, str) else None,
            padding=padding,
        )

    @classmethod
    def from_json(
        cls,
        path: str | Path,
        settings: Mapping[str, object] | None = None,
        model: Mapping[str, object] | None = None,
        generation: Mapping[str, object] | None = None,
    ) -> Tokenizer:
        """Return the tokenizer of a tokenizer.json file.

        Args:
          path: tokenizer.json.
          settings: the parsed tokenizer_config.json beside it: bos_token, eos_token, add_bos_token, chat_template.
          model: the parsed config.json, whose bos_token_id stands in for an absent setting.
          generation: the parsed generation_config.json.  `eos_token_id` of it and of `model`, one or several, end a text as well.

        Raises:
          CheckpointFormatError: the file cannot be read, or a setting names a token that is not in it.
        """
        settings, model, generation, path = settings or {}, model or {}, generation or {}, Path(path)
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointFormatError(f"{path}: cannot be read: {error}") from None
        try:
            backend = Backend.from_str(source)
        except Exception as error:  # the library raises Exception itself, nothing narrower
            raise CheckpointFormatError(f"{path}: {str(error).splitlines()[0][:200]}") from None
        backend.no_padding()
        backend.no_truncation()
        bos = _named(backend, settings, "bos_token", path)
        bos = [bos] if bos is not None else _ids(model, "bos_token_id", path)[:1]
        eos = _named(backend, settings, "eos_token", path)
        stops = [] if eos is None else [eos]
        stops += _ids(model, "eos_token_id", path) + _ids(generation, "eos_token_id", path)
        add_bos = settings.get("add_bos_token")
        if not isinstance(add_bos, bool):
            # else the file's own post-processor tells, by the tokens that it puts in front of a text
            front = _front(backend, bos, path)
            add_bos, bos = bool(front), front or bos
        template = settings.get("chat_template")
        return cls(
            backend,
            path=str(path),
            bos_id=bos[0] if bos else None,
            stop_ids=stops,
            add_bos=add_bos,
            template=template if isinstance(template, str) else None,
        )


def _named(backend: Backend, settings: Mapping[str, object], name: str, path: Path) -> int | None:
    """Return the id of a token that tokenizer_config.json names, as a text or as {"content": text}."""
    token = settings.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return None
    # JSON may hold half of a surrogate pair, which is in no vocabulary
    sound = isinstance(token, str) and not any("\ud800" <= char <= "\udfff" for char in token)
    index = backend.token_to_id(token) if sound else None
    if index is None:
        raise CheckpointFormatError(f"{path}: {name}={str(token)[:80]!r} is not in its vocabulary")
    return index


def _ids(values: Mapping[str, object], name: str, path: Path) -> list[int]:
    """Return the ids under a key that holds one, a list of them, or null."""
    value = values.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(index) is int for index in ids):
        raise CheckpointFormatError(f"{path}: {name}={str(value)[:80]} beside it; allowed is an id or a list of ids")
    return ids


def _front(backend: Backend, bos: list[int], path: Path) -> list[int]:
    """Return the ids that the file's post-processor puts in front of a text, at most one.  An eos behind it is left out: texts go on."""
    plain, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    if not plain:
        # a vocabulary without that letter: nothing tells what is in front from what is behind
        return bos if whole[:1] == bos else []
    count = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    if count > 1:
        raise CheckpointFormatError(f"{path}: puts {count} tokens in front of a text; allowed is one, bos")
    return whole[:count]


class StreamDecoder:
    """Decoder of ids that come one at a time.  A character whose bytes span tokens comes out whole, with its last token.

    The joined pieces of `feed` and `finish` equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        # ids of the last piece, which some decoders need as context, and ids that are not out yet
        self._context: list[int] = []
        self._pending: list[int] = []

    def feed(self, index: int) -> str:
        """Return the new text that this id completes; often empty in the middle of a character."""
        self._pending.append(int(index))
        return self._piece(final=False)

    def finish(self) -> str:
        """Return the remaining text, with U+FFFD for an incomplete character."""
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        decode = self._tokenizer.decode
        before = decode(self._context, skip_special=self._skip_special)
        text = decode(self._context + self._pending, skip_special=self._skip_special)
        if not final and (len(text) <= len(before) or text.endswith("\ufffd")):
            return ""
        self._context, self._pending = self._pending, []
        return text[len(before) :]
