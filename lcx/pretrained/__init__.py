"""Pretrained models and their tokenizers; nothing here imports JAX."""

from lcx.pretrained.errors import CheckpointFormatError, CheckpointMismatch, LoadError
from lcx.pretrained.registry import MODELS, Checkpoint, is_installed, load_arrays
from lcx.pretrained.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "MODELS",
    "Checkpoint",
    "CheckpointFormatError",
    "CheckpointMismatch",
    "LoadError",
    "StreamDecoder",
    "Tokenizer",
    "is_installed",
    "load_arrays",
]
