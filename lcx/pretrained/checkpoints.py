"""Weights of a GGUF file or a Hugging Face folder as arrays in lcx's own names and layouts (`lcx.model_config.param_shapes`).

Every native array is put together from one to three stored ones.  `_parts` says from which; the same list drives the
check of names, shapes and types, which comes before any value is read, and the conversion.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lcx.model_config import ModelConfig, param_shapes
from lcx.pretrained import cache
from lcx.pretrained.errors import CheckpointFormatError, CheckpointMismatch, LoadError
from lcx.pretrained.gguf_header import READABLE, GGUFFile, open_gguf
from lcx.pretrained.model_configs import config_from_gguf, config_from_hf
from lcx.pretrained.rope_settings import ROPE_TENSORS
from lcx.pretrained.safetensors_map import DTYPES, SafetensorsFile, open_safetensors

MAX_JSON_BYTES = 64 << 20

# native name in a layer -> stored names; {} is the layer
GGUF_LAYER = {
    "attn_norm": ("blk.{}.attn_norm.weight",),
    "qkv": ("blk.{}.attn_q.weight", "blk.{}.attn_k.weight", "blk.{}.attn_v.weight"),
    "qkv_bias": ("blk.{}.attn_q.bias", "blk.{}.attn_k.bias", "blk.{}.attn_v.bias"),
    "q_norm": ("blk.{}.attn_q_norm.weight",),
    "k_norm": ("blk.{}.attn_k_norm.weight",),
    "o": ("blk.{}.attn_output.weight",),
    "o_bias": ("blk.{}.attn_output.bias",),
    "post_attn_norm": ("blk.{}.post_attention_norm.weight",),
    "mlp_norm": ("blk.{}.ffn_norm.weight",),
    "gate_up": ("blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"),
    "down": ("blk.{}.ffn_down.weight",),
    "post_mlp_norm": ("blk.{}.post_ffw_norm.weight",),
}
# Phi-3 stores the matrices already joined, as lcx wants them
GGUF_LAYER_PHI3 = GGUF_LAYER | {"qkv": ("blk.{}.attn_qkv.weight",), "gate_up": ("blk.{}.ffn_up.weight",)}
GGUF_TOP = {"embed": "token_embd.weight", "norm": "output_norm.weight", "lm_head": "output.weight"}
HF_LAYER = {
    "attn_norm": ("model.layers.{}.input_layernorm.weight",),
    "qkv": tuple(f"model.layers.{{}}.self_attn.{x}_proj.weight" for x in "qkv"),
    "qkv_bias": tuple(f"model.layers.{{}}.self_attn.{x}_proj.bias" for x in "qkv"),
    "q_norm": ("model.layers.{}.self_attn.q_norm.weight",),
    "k_norm": ("model.layers.{}.self_attn.k_norm.weight",),
    "o": ("model.layers.{}.self_attn.o_proj.weight",),
    "o_bias": ("model.layers.{}.self_attn.o_proj.bias",),
    "mlp_norm": ("model.layers.{}.post_attention_layernorm.weight",),
    "gate_up": ("model.layers.{}.mlp.gate_proj.weight", "model.layers.{}.mlp.up_proj.weight"),
    "down": ("model.layers.{}.mlp.down_proj.weight",),
}
HF_LAYER_PHI3 = HF_LAYER | {
    "qkv": ("model.layers.{}.self_attn.qkv_proj.weight",),
    "gate_up": ("model.layers.{}.mlp.gate_up_proj.weight",),
}
# with norms after attention and MLP, `post_attention_layernorm` is what it says; without, it is the norm before the MLP
HF_LAYER_POST_NORMS = HF_LAYER | {
    "post_attn_norm": ("model.layers.{}.post_attention_layernorm.weight",),
    "mlp_norm": ("model.layers.{}.pre_feedforward_layernorm.weight",),
    "post_mlp_norm": ("model.layers.{}.post_feedforward_layernorm.weight",),
}
HF_TOP = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "lm_head": "lm_head.weight"}


@dataclass(frozen=True)
class Stored:
    """Stored array: shape in numpy's order, type, and a function that gets its values."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Part:
    """A stored array, the shape that the config asks for, and the number of heads whose rows are permuted (0: none)."""

    name: str
    shape: tuple[int, ...]
    permuted_heads: int = 0


def unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder rows of a q or k matrix from interleaved RoPE pairs (2i, 2i+1) to half-split pairs (i, i + D/2).

    Args:
      rows: [num_heads * D, ...], as GGUF files of arch llama store them.

    Returns:
      Like rows.
    """
    split = rows.reshape(num_heads, -1, 2, *rows.shape[1:])
    return split.swapaxes(1, 2).reshape(rows.shape)


def _parts(config: ModelConfig, layer_names: Mapping[str, tuple[str, ...]], top: Mapping[str, str], permuted: bool):
    """Return native name -> the stored parts that lie side by side in its array."""
    c = config
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    # columns of the native array that each part fills
    widths = {"qkv": (q, kv, kv), "qkv_bias": (q, kv, kv), "gate_up": (c.d_ff, c.d_ff)}
    heads = (c.num_heads, c.num_kv_heads, 0)
    parts: dict[str, list[Part]] = {}
    for native, shape in param_shapes(config).items():
        if not native.startswith("layers."):
            stored = (c.vocab_size, c.d_model) if native == "lm_head" else shape
            parts[native] = [Part(top[native], stored)]
            continue
        _, index, kind = native.split(".")
        names = [name.format(index) for name in layer_names[kind]]
        columns = widths[kind] if len(names) > 1 else (shape[-1],)
        parts[native] = [
            Part(name, (width, *shape[:-1]), heads[i] if permuted and kind in ("qkv", "qkv_bias") else 0)
            for i, (name, width) in enumerate(zip(names, columns, strict=True))
        ]
    return parts


def _check(path: str, parts: Mapping[str, list[Part]], stored: Mapping[str, Stored], dtypes, ignored: Set[str]) -> None:
    """Raise CheckpointMismatch with every missing, misshaped, mistyped and unknown array."""
    problems = []
    wanted = [part for group in parts.values() for part in group]
    for part in wanted:
        array = stored.get(part.name)
        if array is None:
            problems.append(f"{part.name} is missing")
            continue
        if array.shape != part.shape:
            problems.append(f"{part.name} has shape {array.shape}, its config asks for {part.shape}")
        if array.dtype not in dtypes:
            problems.append(f"{part.name} has type {array.dtype}, which lcx does not read")
    unknown = set(stored) - {part.name for part in wanted} - ignored
    problems += [f"{name[:80]!r} is in the file but not in the model" for name in sorted(unknown)]
    if problems:
        raise CheckpointMismatch(path, problems)


def _convert(
    parts: Mapping[str, list[Part]], stored: Mapping[str, Stored], config: ModelConfig, dtype: str, shift: bool
):
    """Read, un-permute, transpose and join the parts of an array.  `shift`: norm weights are stored minus 1."""
    arrays = {}
    for native, shape in param_shapes(config).items():
        out = np.empty(shape, cache.NUMPY_DTYPES[dtype])
        start = 0
        for part in parts[native]:
            values = stored[part.name].read()
            if part.permuted_heads:
                values = unpermute(values, part.permuted_heads)
            if shift and native.endswith("norm"):
                values = values.astype(np.float32) + 1
            if native == "embed":
                out[:] = values
                continue
            stop = start + values.shape[0]
            out[..., start:stop] = values.T
            start = stop
        arrays[native] = out
    return arrays


def load_gguf(path: str | Path, dtype: str = "float32") -> tuple[ModelConfig, dict[str, np.ndarray], GGUFFile, str]:
    """Return config and native arrays of a GGUF file, from the cache where it has them, else added to it.

    Args:
      path: a file of arch llama, qwen2, qwen3, phi3 or gemma3.
      dtype: "float32" or "bfloat16".

    Returns:
      config, {name: array} as in `param_shapes`, the header (for the tokenizer), sha256 of the file.  Arrays from the
      cache are read-only views over mmap.

    Raises:
      CheckpointFormatError: the file cannot be read.
      CheckpointMismatch: the file's arrays do not fit its config.
    """
    _check_dtype(dtype)
    file = open_gguf(path)
    config, parts = plan_gguf(file)
    sha256 = hashlib.sha256(file.buffer).hexdigest()
    arrays = cache.load(sha256, dtype, config)
    if arrays is None:
        arrays = _convert(parts, _gguf_stored(file), config, dtype, shift=False)
        cache.store(sha256, dtype, config, arrays)
    return config, arrays, file, sha256


def plan_gguf(file: GGUFFile) -> tuple[ModelConfig, dict[str, list[Part]]]:
    """Return the config of a GGUF file and the parts of its arrays, names, shapes and types checked.  Raises as `load_gguf`."""
    config = config_from_gguf(file)
    # converters permute q and k of this architecture only
    permuted = file.fields["general.architecture"] == "llama"
    names = GGUF_LAYER_PHI3 if file.fields["general.architecture"] == "phi3" else GGUF_LAYER
    parts = _parts(config, names, GGUF_TOP, permuted)
    _check(file.path, parts, _gguf_stored(file), READABLE, ROPE_TENSORS)
    return config, parts


def _gguf_stored(file: GGUFFile) -> dict[str, Stored]:
    return {
        name: Stored(info.shape, info.type.name, lambda name=name: file.values(name))
        for name, info in file.tensors.items()
    }


def load_hf(path: str | Path, dtype: str = "float32") -> tuple[ModelConfig, dict[str, np.ndarray], str]:
    """Return config and native arrays of a local folder in Hugging Face layout.

    Args:
      path: has config.json, and model.safetensors or model.safetensors.index.json with its shards.
      dtype: "float32" or "bfloat16".

    Returns:
      config, {name: array} as in `param_shapes`, sha256 over the sha256 of config.json and of the weight files.

    Raises:
      CheckpointFormatError: a file is missing or cannot be read, or the config asks for what lcx does not compute.
      CheckpointMismatch: the arrays do not fit the config.
    """
    _check_dtype(dtype)
    path = Path(path)
    raw = read_json(path / "config.json")
    config = config_from_hf(raw, str(path / "config.json"))
    files = _weight_files(path)
    stored: dict[str, Stored] = {}
    for file in files:
        twice = sorted(set(stored) & set(file.entries))
        if twice:
            raise CheckpointMismatch(file.path, [f"{name} is in another shard as well" for name in twice])
        stored |= {
            name: Stored(shape, kind, lambda name=name, file=file: file.values(name))
            for name, (kind, shape, _) in file.entries.items()
        }
    if config.tied and _has_own_head(stored):
        config = replace(config, tied=False)
    fused = raw["architectures"] == ["Phi3ForCausalLM"]
    names = HF_LAYER_PHI3 if fused else HF_LAYER_POST_NORMS if config.post_norms else HF_LAYER
    parts = _parts(config, names, HF_TOP, permuted=False)
    ignored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.num_layers)}
    if config.tied:
        ignored.add(HF_TOP["lm_head"])
    _check(str(path), parts, stored, DTYPES.keys(), ignored)
    arrays = _convert(parts, stored, config, dtype, shift=config.post_norms)
    return config, arrays, _sha256_of([path / "config.json", *(Path(file.path) for file in files)])


def _has_own_head(stored: Mapping[str, Stored]) -> bool:
    """Return True where the file's lm_head is not its embedding; then the file's is used, whatever tie_word_embeddings says."""
    embed, head = (stored.get(HF_TOP[name]) for name in ("embed", "lm_head"))
    if embed is None or head is None or head.dtype not in DTYPES or embed.dtype not in DTYPES:
        return False
    return embed.shape != head.shape or not np.array_equal(embed.read(), head.read())


def _weight_files(path: Path) -> list[SafetensorsFile]:
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return [open_safetensors(single)]
    if not index.exists():
        raise CheckpointFormatError(f"{path}: has neither {single.name} nor {index.name}")
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointFormatError(f"{index}: weight_map is not a mapping from weights to files")
    names = sorted(set(table.values()))
    for name in names:
        # a shard lies beside its index; a name with a folder in it could lead anywhere
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointFormatError(
                f"{index}: weight_map names {name[:80]!r}; allowed is a *.safetensors file beside it"
            )
    files = [open_safetensors(path / name) for name in names]
    owner = {weight: Path(file.path).name for file in files for weight in file.entries}
    wrong = sorted(weight for weight in table if owner.get(weight) != table[weight])
    if wrong:
        raise CheckpointMismatch(str(index), [f"{weight} is not in {table[weight]}" for weight in wrong])
    return files


def read_json(path: Path) -> dict:
    """Return the mapping that a JSON file holds.

    Raises:
      CheckpointFormatError: no such file, too long, not JSON, or not a mapping.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointFormatError(f"{path}: {path.stat().st_size:,} bytes, allowed are {MAX_JSON_BYTES:,}")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointFormatError(f"{path}: cannot be read: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointFormatError(f"{path}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointFormatError(f"{path}: holds a {type(value).__name__}, allowed is a mapping")
    return value


def _check_dtype(dtype: str) -> None:
    if dtype not in cache.NUMPY_DTYPES:
        raise LoadError(f"dtype={dtype!r}; allowed are {', '.join(cache.NUMPY_DTYPES)}")


def _sha256_of(paths: list[Path]) -> str:
    total = hashlib.sha256()
    for path in sorted(paths):
        with open(path, "rb") as file:
            total.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()
