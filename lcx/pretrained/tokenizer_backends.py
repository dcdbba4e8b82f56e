"""Backends of the `tokenizers` library from the fields of a GGUF header: byte-level BPE and SentencePiece."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from lcx.pretrained.errors import CheckpointFormatError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# as in the tokenizer.json of each family; smollm is a Sequence of two pre-tokenizers instead
SPLIT_REGEX = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def field(fields: Mapping[str, object], name: str, kind: type, path: str):
    value = fields.get(f"tokenizer.ggml.{name}")
    if not isinstance(value, kind):
        fault = "is missing" if value is None else f"is a {type(value).__name__}"
        raise CheckpointFormatError(f"{path}: tokenizer.ggml.{name} {fault}, allowed is a {kind.__name__}")
    return value


def id_field(fields: Mapping[str, object], name: str, path: str) -> int | None:
    return None if fields.get(f"tokenizer.ggml.{name}") is None else field(fields, name, int, path)


def byte_level(fields: Mapping[str, object], tokens: list[str], path: str) -> Backend:
    """Return a backend of GPT-2's kind: bytes as printable characters, merges in the file."""
    pre = field(fields, "pre", str, path)
    merges = [tuple(merge.split(" ", 1)) for merge in field(fields, "merges", list, path)]
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


def sentencepiece(fields: Mapping[str, object], tokens: list[str], kinds: np.ndarray, path: str) -> Backend:
    """Return a backend of Gemma's kind: scores instead of merges, byte fallback.  Checked only against Gemma 3."""
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
    """Return every split of a normal token into two tokens, best score first."""
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


def missing_bytes(backend: Backend) -> frozenset[int]:
    """Return the bytes that a byte-level BPE drops because it has no token for them."""
    if not isinstance(backend.decoder, decoders.ByteLevel) or not isinstance(backend.model, models.BPE):
        return frozenset()
    # GPT-2's table: printable bytes stand for themselves, the others for characters from U+0100 on, in order
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
    return frozenset(byte for byte, symbol in symbols.items() if backend.token_to_id(symbol) is None)
