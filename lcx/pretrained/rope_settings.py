"""RoPE of a checkpoint as `lcx.model_config.Rope`: from config.json as transformers reads it, from GGUF keys as llama.cpp does.

Every kind of scaling comes down to divisors of the inverse frequencies and a factor on cos and sin.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from lcx.model_config import Rope
from lcx.pretrained.errors import CheckpointFormatError
from lcx.pretrained.fields import Fields
from lcx.pretrained.gguf_header import GGUFFile

HF_KINDS = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")
GGUF_KINDS = ("none", "linear", "yarn", "longrope")
BETA_FAST, BETA_SLOW = 32.0, 1.0  # YaRN, arXiv:2309.00071, section 3.2


@dataclass(frozen=True)
class RopeSettings:
    """RoPE of a model: up to `limit` tokens and beyond, and the context that the scaling reaches (0: that of the file)."""

    rope: Rope
    limit: int | None = None
    long: Rope | None = None
    context: int = 0


def _rope(path: str, **values) -> Rope:
    try:
        return Rope(**values)
    except ValueError as error:
        raise CheckpointFormatError(f"{path}: {error}") from None


def yarn_divisors(
    base: float, pairs: int, factor: float, trained: int, fast: float, slow: float, truncate: bool = True
):
    """Return YaRN's divisors: `factor` for pairs that turn less than `slow` times in `trained` tokens, 1 for more than `fast` times.

    Source: YaRN, arXiv:2309.00071, equation 20, with the ramp over whole pairs as in transformers and llama.cpp.
    """

    def pair(turns: float) -> float:
        return pairs * math.log(trained / (turns * 2 * math.pi)) / math.log(base)

    low, high = pair(fast), pair(slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    width = high - low or 0.001
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(pairs)]
    return tuple(1 / (r / factor + 1 - r) for r in ramp)


def llama3_divisors(base: float, pairs: int, factor: float, low: float, high: float, trained: int) -> tuple[float, ...]:
    """Return the divisors of Llama 3.1, as in `transformers.modeling_rope_utils`."""
    divisors = []
    for i in range(pairs):
        wavelength = 2 * math.pi * base ** (i / pairs)
        # 0 where a wavelength does not fit into the trained context, 1 where it fits often, in between interpolated
        smooth = min(max((trained / wavelength - low) / (high - low), 0.0), 1.0)
        divisors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(divisors)


def hf_rope(f: Fields, scaling: Fields, key: str, head_dim: int, context: int, default_base: float, phi3: bool = False):
    """Return the RoPE of one section of config.json.

    Args:
      f: the whole file; older ones have `rope_theta`, `partial_rotary_factor` and `original_max_position_embeddings` there.
      scaling: the section, whose keys begin with `key`.
      key: "rope_parameters", "rope_scaling" or a part of them.
      head_dim: channels of a head.
      context: max_position_embeddings.
      default_base: rope_theta where the file has none.
      phi3: "su" and "yarn" are old names of longrope.

    Raises:
      CheckpointFormatError: a kind that lcx does not compute, or a number that is missing or out of range.
    """
    base = scaling.number(f"{key}.rope_theta", f.number("rope_theta", default_base))
    if base <= 1:
        raise CheckpointFormatError(f"{f.path}: rope_theta={base}; allowed is a number above 1")
    part = scaling.number(f"{key}.partial_rotary_factor", f.number("partial_rotary_factor", 1.0))
    if part != 1 and not phi3:
        raise CheckpointFormatError(f"{f.path}: partial_rotary_factor={part}; allowed is 1 for this architecture")
    dim = int(head_dim * part) if part != 1 else head_dim
    if dim > head_dim or dim < 2 or dim % 2:
        raise CheckpointFormatError(
            f"{f.path}: partial_rotary_factor={part} of head_dim={head_dim} is not an even number"
        )
    make = partial(_rope, f.path, base=base, dim=None if dim == head_dim else dim)
    pairs = dim // 2
    kind_key = f"{key}.rope_type" if scaling.has(f"{key}.rope_type") else f"{key}.type"
    kind = scaling.text(kind_key, "default")
    if phi3 and kind in ("su", "yarn"):
        kind = "longrope"
    if kind == "default":
        return RopeSettings(make())
    if kind not in HF_KINDS:
        raise scaling.fail(kind_key, f"one of {', '.join(HF_KINDS)}")
    if kind == "linear":
        return RopeSettings(make(divisors=(scaling.number(f"{key}.factor"),)))
    if kind == "dynamic":
        # up to the trained context it is plain RoPE, whatever the factor
        scaling.number(f"{key}.factor")
        return RopeSettings(make(), limit=context)
    # a value beside the section wins over the one in it, as in transformers
    name = "original_max_position_embeddings"
    trained = f.integer(name) if f.has(name) else scaling.integer(f"{key}.{name}", context)
    if kind == "llama3":
        stretch, low, high = (
            scaling.number(f"{key}.{name}") for name in ("factor", "low_freq_factor", "high_freq_factor")
        )
        if not low < high:
            raise scaling.fail(f"{key}.high_freq_factor", f"a number above low_freq_factor={low}")
        return RopeSettings(make(divisors=llama3_divisors(base, pairs, stretch, low, high, trained)))
    factor = scaling.number(f"{key}.factor", context / trained)
    if kind == "yarn":
        scale = _yarn_scale(scaling, key, factor)
        fast = scaling.number(f"{key}.beta_fast", BETA_FAST)
        slow = scaling.number(f"{key}.beta_slow", BETA_SLOW)
        truncate = scaling.boolean(f"{key}.truncate", True)
        divisors = yarn_divisors(base, pairs, factor, trained, fast, slow, truncate)
        reach = int(min(factor * trained, 1 << 31))
        return RopeSettings(make(divisors=divisors, scale=scale), context=reach)
    scale = scaling.number(f"{key}.attention_factor", _longrope_scale(factor, trained))
    short, long = (
        make(divisors=scaling.numbers(f"{key}.{name}", pairs), scale=scale) for name in ("short_factor", "long_factor")
    )
    return RopeSettings(short, trained, long)


def _yarn_scale(scaling: Fields, key: str, factor: float) -> float:
    default = _yarn_mscale(factor)
    weights = [scaling.values.get(f"{key}.{name}") for name in ("mscale", "mscale_all_dim")]
    if all(weights):  # only one of the two has no effect, as in transformers
        of_one, of_all = (scaling.number(f"{key}.{name}") for name in ("mscale", "mscale_all_dim"))
        default = _yarn_mscale(factor, of_one) / _yarn_mscale(factor, of_all)
    return scaling.number(f"{key}.attention_factor", default)


def _yarn_mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope_scale(factor: float, trained: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 and trained > 1 else 1.0


def gguf_rope(file: GGUFFile, f: Fields, arch: str, head_dim: int, context: int) -> RopeSettings:
    """Return the RoPE of a GGUF file.

    As in llama.cpp: a factor without a type is linear scaling, type "none" turns the factor off, `rope_freqs.weight` divides frequencies
    whatever the type, and YaRN's own factor on cos and sin is multiplied by `attn_factor`.

    Raises:
      CheckpointFormatError: a key or a tensor that is out of range or that lcx does not compute.
    """
    rope = f"{arch}.rope"
    dim = f.integer(f"{rope}.dimension_count", head_dim)
    if dim != head_dim and (arch != "phi3" or dim > head_dim or dim % 2):
        raise f.fail(f"{rope}.dimension_count", f"head_dim={head_dim}")
    base = f.number(f"{rope}.freq_base", 10_000.0)
    if base <= 1:
        raise f.fail(f"{rope}.freq_base", "a number above 1")
    pairs = dim // 2
    kind = f.text(f"{rope}.scaling.type", "linear")
    if kind not in GGUF_KINDS:
        raise f.fail(f"{rope}.scaling.type", f"one of {', '.join(GGUF_KINDS)}")
    # 0 is "not set", and so is an absent key
    key = f"{rope}.scaling.factor" if f.has(f"{rope}.scaling.factor") else f"{rope}.scale_linear"
    unset = kind == "none" or (type(f.values.get(key)) in (int, float) and f.values[key] == 0)
    factor = 1.0 if unset else f.number(key, 1.0)
    trained = f.integer(f"{rope}.scaling.original_context_length", context)
    make = partial(_rope, f.path, base=base, dim=None if dim == head_dim else dim)
    scale = f.number(f"{rope}.scaling.attn_factor", 1.0)
    f.refuse(f"{rope}.scaling.yarn_log_multiplier", (0.0,))
    if kind == "yarn":
        fast = f.number(f"{rope}.scaling.yarn_beta_fast", BETA_FAST)
        slow = f.number(f"{rope}.scaling.yarn_beta_slow", BETA_SLOW)
        for name in ("yarn_ext_factor", "yarn_attn_factor"):
            f.refuse(f"{rope}.scaling.{name}", (1.0, 1, -1.0))
        own = yarn_divisors(base, pairs, factor, trained, fast, slow)
        scale *= _yarn_mscale(factor)
    else:
        own = (factor,)
    tensors = {
        name: _factors(file, f"{name}.weight", pairs)
        for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")
    }

    def with_factors(factors: tuple[float, ...] | None) -> Rope:
        divisors = own if factors is None else tuple(a * b for a, b in zip(_wide(own, pairs), factors, strict=True))
        return make(divisors=divisors, scale=scale)

    short, long = tensors["rope_factors_short"], tensors["rope_factors_long"]
    reach = int(min(factor * trained, 1 << 31)) if kind == "yarn" else 0
    if tensors["rope_freqs"] is not None or (short is None and long is None):
        if kind == "longrope" and tensors["rope_freqs"] is None:
            raise CheckpointFormatError(
                f"{file.path}: {rope}.scaling.type='longrope' without tensors rope_factors_*.weight"
            )
        return RopeSettings(with_factors(tensors["rope_freqs"]), context=reach)
    if short is None or long is None:
        raise CheckpointFormatError(
            f"{file.path}: has one of rope_factors_short.weight and rope_factors_long.weight; allowed are both"
        )
    return RopeSettings(with_factors(short), trained, with_factors(long), reach)


def _wide(divisors: tuple[float, ...], pairs: int) -> tuple[float, ...]:
    return divisors * pairs if len(divisors) == 1 else divisors


def _factors(file: GGUFFile, name: str, pairs: int) -> tuple[float, ...] | None:
    info = file.tensors.get(name)
    if info is None:
        return None
    if info.shape != (pairs,) or info.type.name != "F32":
        raise CheckpointFormatError(
            f"{file.path}: tensor {name!r} is {info.type.name} {info.shape}; allowed is F32 {(pairs,)}"
        )
    divisors = tuple(float(value) for value in file.values(name))
    if not all(0 < value < 1e30 for value in divisors):
        raise CheckpointFormatError(f"{file.path}: tensor {name!r} holds a divisor that is not above 0")
    return divisors


ROPE_TENSORS = frozenset({"rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"})


def model_values(settings: RopeSettings, context: int) -> Mapping[str, object]:
    """Return the fields of `ModelConfig` that follow from RoPE."""
    return {
        "rope": settings.rope,
        "rope_limit": settings.limit,
        "rope_long": settings.long,
        "context": max(context, settings.context),
    }
