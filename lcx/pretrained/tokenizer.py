"""Text to token ids and back, over the `tokenizers` library: from the fields of a GGUF file or from tokenizer.json.

Special tokens in a user's text stay text: a haystack that quotes `<|im_end|>` does not end the turn.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from lcx.errors import UserError
from lcx.pretrained.gguf_header import CheckpointFormatError

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
# as in the tokenizer.json of each family; smollm is a Sequence of two pre-tokenizers instead
SPLIT_REGEX = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
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


class Tokenizer:
    """Encodes, decodes and formats chats.  `bos_id`, `eos_id` are None where the model has none.

    `add_bos` says that the model was trained with `bos_id` in front; `encode` never adds it, the caller does.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        path: str,
        bos_id: int | None,
        eos_id: int | None,
        add_bos: bool,
        template: str | None = None,
    ):
        self.path, self.bos_id, self.eos_id, self.add_bos = path, bos_id, eos_id, add_bos
        self._backend, self._template = backend, template
        self._lock = threading.Lock()
        backend.no_padding()
        backend.no_truncation()
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(index for index, token in added.items() if token.special)
        self._missing = _missing_bytes(backend)
        if add_bos and bos_id is None:
            raise CheckpointFormatError(f"{path}: asks for a bos token in front of a text but names none")
        for name, index in (("bos_id", bos_id), ("eos_id", eos_id)):
            if index is not None and not 0 <= index < self.vocab_size:
                raise CheckpointFormatError(f"{path}: {name}={index}, allowed are 0 to {self.vocab_size - 1}")

    @property
    def vocab_size(self) -> int:
        """Ids that `decode` knows: 0 to vocab_size - 1.  A model's embedding may be padded beyond it."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of a text, without a bos token in front.

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
            raise UserError(f"text has U+{ord(text[at]):04X} at {at:,}, which the vocabulary of {self.path} lacks")
        # the switch belongs to the backend, not to the call
        with self._lock:
            self._backend.encode_special_tokens = not parse_special
            ids = self._backend.encode(text, add_special_tokens=False).ids
        if not parse_special and not self._special.isdisjoint(ids):
            found = self._backend.id_to_token(next(index for index in ids if index in self._special))
            raise UserError(
                f"text becomes the special token {found!r} of {self.path}; remove it, or pass parse_special=True"
            )
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of token ids.  Bytes that are not UTF-8 become U+FFFD.

        Raises:
          UserError: an id is outside the vocabulary.
        """
        ids = [int(index) for index in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(index for index in ids if not 0 <= index < self.vocab_size)
            raise UserError(f"token id {wrong}, allowed are 0 to {self.vocab_size - 1}")
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder that takes one id at a time."""
        return StreamDecoder(self, skip_special)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant speaks.  Special tokens inside messages stay text.

        Args:
          messages: [{"role": "user", "content": "..."}, ...]; roles are system, user and assistant.

        Raises:
          UserError: the model's chat format is unknown to lcx, or a message is not of this form.
        """
        if self._template != SMOLLM2_TEMPLATE:
            raise UserError(
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
        """The tokenizer in the `tokenizer.*` fields of a GGUF header.

        Raises:
          CheckpointFormatError: a field is missing or does not fit, or a tokenizer that lcx was not checked against.
        """
        tokens = _field(fields, "tokens", list, path)
        kinds = fields.get("tokenizer.ggml.token_type")
        if not isinstance(kinds, np.ndarray) or len(kinds) != len(tokens):
            raise CheckpointFormatError(
                f"{path}: tokenizer.ggml.token_type must have {len(tokens):,} entries, one a token"
            )
        if repeated := len(tokens) - len(set(tokens)):
            raise CheckpointFormatError(f"{path}: tokenizer.ggml.tokens has {repeated:,} tokens twice")
        model = _field(fields, "model", str, path)
        if model == "gpt2":
            backend = _byte_level(fields, tokens, path)
        elif model == "llama":
            backend = _sentencepiece(fields, tokens, kinds, path)
        else:
            raise CheckpointFormatError(f"{path}: tokenizer.ggml.model={model[:80]!r}, allowed are 'gpt2' and 'llama'")
        control = [tokens[i] for i in np.flatnonzero(kinds == CONTROL)]
        plain = [tokens[i] for i in np.flatnonzero(kinds == USER_DEFINED)]
        if "" in control or "" in plain:
            raise CheckpointFormatError(f"{path}: tokenizer.ggml.tokens has an empty special token")
        backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
        add_bos = fields.get(
            "tokenizer.ggml.add_bos_token", model == "llama" or fields.get("tokenizer.ggml.pre") == "llama-bpe"
        )
        template = fields.get("tokenizer.chat_template")
        return cls(
            backend,
            path=path,
            bos_id=_id(fields, "bos_token_id", path),
            eos_id=_id(fields, "eos_token_id", path),
            add_bos=bool(add_bos) if isinstance(add_bos, (bool, int)) else False,
            template=template if isinstance(template, str) else None,
        )

    @classmethod
    def from_json(
        cls, path: str | Path, settings: Mapping[str, object] | None = None, model: Mapping[str, object] | None = None
    ) -> Tokenizer:
        """The tokenizer of a tokenizer.json file.

        Args:
          path: tokenizer.json.
          settings: the parsed tokenizer_config.json beside it: bos_token, eos_token, add_bos_token, chat_template.
          model: the parsed config.json, whose bos_token_id and eos_token_id stand in for absent settings.

        Raises:
          CheckpointFormatError: the file cannot be read, or a setting names a token that is not in it.
        """
        settings, model, path = settings or {}, model or {}, Path(path)
        try:
            source = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointFormatError(f"{path}: cannot be read: {error}") from None
        try:
            backend = Backend.from_str(source)
        except Exception as error:  # the library raises Exception itself, nothing narrower
            raise CheckpointFormatError(f"{path}: {str(error).splitlines()[0][:200]}") from None
        ids = {}
        for name in ("bos", "eos"):
            token = settings.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            found = model.get(f"{name}_token_id")
            found = found[0] if isinstance(found, list) and found else found
            if token is not None:
                found = backend.token_to_id(token) if isinstance(token, str) else None
                if found is None:
                    raise CheckpointFormatError(f"{path}: {name}_token={str(token)[:80]!r} is not in its vocabulary")
            ids[name] = found if type(found) is int else None
        add_bos = settings.get("add_bos_token")
        if not isinstance(add_bos, bool):
            # then what the file's own post-processor puts in front of a text says it
            add_bos = ids["bos"] is not None and backend.encode("a").ids[:1] == [ids["bos"]]
        template = settings.get("chat_template")
        return cls(
            backend,
            path=str(path),
            bos_id=ids["bos"],
            eos_id=ids["eos"],
            add_bos=add_bos,
            template=template if isinstance(template, str) else None,
        )


class StreamDecoder:
    """Text of ids that come one at a time.  A character whose bytes span tokens comes out whole, with its last token.

    The joined pieces of `feed` and `finish` equal `decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool):
        self._tokenizer, self._skip_special = tokenizer, skip_special
        # ids of the last piece, which some decoders need as context, and ids that are not out yet
        self._context: list[int] = []
        self._pending: list[int] = []

    def feed(self, index: int) -> str:
        """New text that this id completes; often empty in the middle of a character."""
        self._pending.append(int(index))
        return self._piece(final=False)

    def finish(self) -> str:
        """What is left, with U+FFFD for an incomplete character."""
        return self._piece(final=True)

    def _piece(self, final: bool) -> str:
        decode = self._tokenizer.decode
        before = decode(self._context, skip_special=self._skip_special)
        text = decode(self._context + self._pending, skip_special=self._skip_special)
        if not final and (len(text) <= len(before) or text.endswith("\ufffd")):
            return ""
        self._context, self._pending = self._pending, []
        return text[len(before) :]


def _field(fields: Mapping[str, object], name: str, kind: type, path: str):
    value = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, kind):
        found = "is missing" if value is None else f"is a {type(value).__name__}"
        raise CheckpointFormatError(f"{path}: tokenizer.ggml.{name} {found}, allowed is a {kind.__name__}")
    return value


def _id(fields: Mapping[str, object], name: str, path: str) -> int | None:
    return None if fields.get(f"tokenizer.ggml.{name}") is None else _field(fields, name, int, path)


def _byte_level(fields: Mapping[str, object], tokens: list[str], path: str) -> Backend:
    """GPT-2's kind: bytes as printable characters, merges in the file."""
    pre = _field(fields, "pre", str, path)
    merges = [tuple(merge.split(" ", 1)) for merge in _field(fields, "merges", list, path)]
    vocab = {token: index for index, token in enumerate(tokens)}
    if pre != "smollm" and pre not in SPLIT_REGEX:
        allowed = ", ".join(repr(name) for name in ("smollm", *SPLIT_REGEX))
        raise CheckpointFormatError(f"{path}: tokenizer.ggml.pre={pre[:80]!r}, allowed are {allowed}")
    try:
        # Llama 3 looks a whole word up before it merges
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    except Exception as error:  # the library raises Exception itself, nothing narrower
        raise CheckpointFormatError(
            f"{path}: tokenizer.ggml.merges do not fit the tokens: {str(error)[:120]!r}"
        ) from None
    backend = Backend(model)
    if pre == "smollm":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    else:
        split = pre_tokenizers.Split(Regex(SPLIT_REGEX[pre]), behavior="isolated")
        steps = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        # the model's own tokenizer.json has it: text in another form than NFC comes back in NFC
        backend.normalizer = normalizers.NFC()
    return backend


def _sentencepiece(fields: Mapping[str, object], tokens: list[str], kinds: np.ndarray, path: str) -> Backend:
    """Gemma's kind: scores instead of merges, byte fallback.  Checked against Gemma 3 only."""
    if fields.get("tokenizer.ggml.add_space_prefix") is not False:
        # Llama 2 and Mistral 7B v0.1 put a space in front; no file was at hand to check that against
        raise CheckpointFormatError(
            f"{path}: tokenizer.ggml.add_space_prefix must be false; use a folder with tokenizer.json"
        )
    scores = fields.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) != len(tokens):
        raise CheckpointFormatError(f"{path}: tokenizer.ggml.scores must have {len(tokens):,} entries, one a token")
    vocab = {token: index for index, token in enumerate(tokens)}
    if "<unk>" not in vocab:
        raise CheckpointFormatError(f"{path}: tokenizer.ggml.tokens has no '<unk>'")
    model = models.BPE(
        vocab=vocab,
        merges=_merges_from_scores(tokens, kinds, scores, vocab, path),
        unk_token="<unk>",  # noqa: S106, a token of text
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def _merges_from_scores(tokens, kinds, scores, vocab, path) -> list[tuple[str, str]]:
    """Every split of a normal token into two tokens, best score first."""
    ranked: list[tuple[float, list[tuple[str, str]]]] = []
    for index in np.flatnonzero(kinds == NORMAL):
        token = tokens[index]
        # a token has at most a few dozen characters; a hostile one would make the splits quadratic
        if len(token) > 1_024:
            raise CheckpointFormatError(f"{path}: token {index} has {len(token):,} characters, allowed are 1,024")
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in splits if pair[0] in vocab and pair[1] in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        ranked.append((-float(scores[index]), known))
    ranked.sort(key=lambda entry: entry[0])
    return [pair for _, known in ranked for pair in known]


def _missing_bytes(backend: Backend) -> frozenset[int]:
    """Bytes that a byte-level BPE drops because it has no token for them."""
    if not isinstance(backend.decoder, decoders.ByteLevel) or not isinstance(backend.model, models.BPE):
        return frozenset()
    # GPT-2's table: printable bytes stand for themselves, the others for characters from U+0100 on, in order
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return frozenset(byte for byte, symbol in symbols.items() if backend.token_to_id(symbol) is None)
