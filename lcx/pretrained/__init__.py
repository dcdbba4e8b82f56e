"""Pretrained models and their tokenizers; nothing here imports JAX."""

from lcx.pretrained.checkpoints import CheckpointMismatch
from lcx.pretrained.gguf_header import CheckpointFormatError
from lcx.pretrained.registry import MODELS, Checkpoint, is_installed, load_arrays
from lcx.pretrained.tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "MODELS",
    "Checkpoint",
    "CheckpointFormatError",
    "CheckpointMismatch",
    "StreamDecoder",
    "Tokenizer",
    "is_installed",
    "load_arrays",
]
