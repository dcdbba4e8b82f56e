"""Columns of a row: the meaning of each, its unit, and whether it is measured (another run may give another value)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

VERSION = 2  # of rows and store; a store of another version is refused

# how a point can end; none of them stops a sweep
STATUSES = ("ok", "oom_predicted", "oom", "killed", "timeout", "nonfinite", "error")

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """Column of a row.  `kind`: str, int, float or json.  `measured`: depends on the machine and the moment."""

    name: str
    kind: str
    meaning: str
    measured: bool = False


def _xla(phase: str) -> tuple[Column, ...]:
    kinds = {
        "argument": "arguments: one layer's weights, its cache and the step's activations",
        "output": "results",
        "alias": "results that are written in place of arguments (the donated cache)",
        "temp": "scratch beside arguments and results",
        "peak": "arguments + results + scratch - alias",
    }
    what = f"of the largest {phase} program (one layer), by XLA's buffer assignment, bytes"
    return tuple(Column(f"{phase}_{kind}_bytes", "int", f"{meaning}; {what}") for kind, meaning in kinds.items())


def _quality(prefix: str) -> tuple[Column, ...]:
    """Return the columns of one protocol; those with its name are the second protocol's."""
    under = f" under the protocol {prefix[:-1]}, where it is not the row's first" if prefix else ""
    return (
        Column(f"{prefix}nll", "float", f"mean negative log likelihood of the continuations, nats a token{under}"),
        Column(f"{prefix}kl", "float", f"KL(dense || method) over the continuations, nats a token{under}"),
        Column(f"{prefix}top1_agreement", "float", f"share of tokens whose likeliest next token is dense's{under}"),
        Column(f"{prefix}se_tokens", "float", f"standard error of nll - dense's over tokens, paired, nats{under}"),
        Column(f"{prefix}se_passages", "float", f"the same over the passages' means; null for one passage{under}"),
        Column(f"{prefix}far_minus_dense", "float", f"nll - dense's over the far tokens, nats a token{under}"),
        Column(
            f"{prefix}far_se", "float", f"its standard error, the larger of that over tokens and over passages{under}"
        ),
    )


COLUMNS = (
    Column("key", "str", "hash of the resolved point"),
    Column("status", "str", f"one of {', '.join(STATUSES)}; todo or running where there is no row yet"),
    Column("message", "str", "why the point is not ok; where the first value that is not finite stood"),
    Column("method", "str", "name of the config"),
    Column("model", "str", "name, path or hub id"),
    Column("dtype", "str", "of weights, activations and exact caches"),
    Column("batch", "int", "texts side by side"),
    Column("length", "int", "context: prompt and continuation, tokens"),
    Column("prompt", "int", "tokens read by the prefill"),
    Column("seed", "int", "which passages of the text; 0: spread evenly from its start"),
    Column("text", "str", "name of the text, or of its file"),
    Column("text_sha256", "str", "of the text's file"),
    Column("passages", "int", "passages scored: prompt and continuation each"),
    Column("recipe", "str", "the method's parts and their settings"),
    Column("budget", "int", "tokens a KV head that the method keeps or reads; null where it has no single budget"),
    Column("keep_ratio", "float", "budget / prompt"),
    Column("sources", "str", "sha256 of lcx's version and of the method's source files"),
    Column("notes", "json", "what a reader must know: that the method did nothing, or that times are unsteady", True),
    Column("schedule", "str", "how the prompt is read"),
    Column("implementation", "str", "of attention: xla, pallas, cudnn, or what is taken source by source", True),
    Column("ttft_s", "float", "time to first token: prefill with the last token's logits, median over ttft_n, s", True),
    Column("ttft_p10_s", "float", "10th percentile, s", True),
    Column("ttft_p90_s", "float", "90th percentile, s", True),
    Column("ttft_n", "int", "timed prefills, after `warmups` untimed ones"),
    Column(
        "warmups", "int", "untimed prefills before; as many untimed decode steps and one more come before the timed"
    ),
    Column("dense_ttft_s", "float", "dense attention's ttft_s, measured in turns with the method's, s", True),
    Column("dense_decode_s", "float", "dense attention's decode_s, measured in turns with the method's, s", True),
    Column("load", "float", "the machine's load (1 minute) before the times, for each core", True),
    Column("prefill_tokens_per_s", "float", "batch x prompt / ttft_s", True),
    Column("continuation_s", "float", "one step that reads the whole continuation, s", True),
    Column("decode_s", "float", "one step of one token a text, median over decode_n, s", True),
    Column("decode_p10_s", "float", "10th percentile, s", True),
    Column("decode_p90_s", "float", "90th percentile, s", True),
    Column("decode_n", "int", "timed decode steps"),
    Column("compile_s", "float", "tracing and compiling ahead of all programs, s", True),
    Column("compile_cache_hits", "int", "programs that the persistent compile cache had already", True),
    Column("programs", "int", "distinct programs of layers"),
    Column(
        "overflow",
        "int",
        "pages that a pattern wanted to read and its lists had no place for, over all steps; 0 is exact",
    ),
    Column("cache_bytes", "int", "device bytes of all cache arrays after the prompt; room for the new tokens included"),
    Column("recipe_bytes", "int", "the same as recipe.bytes predicts it"),
    Column(
        "segment_tokens", "json", "tokens that each segment holds after the last step, a mean over layers and KV heads"
    ),
    Column("segment_bytes", "json", "cache_bytes by segment: name -> [arrays, predicted]"),
    Column("peak_cache_bytes", "int", "most bytes of caches that lived at once"),
    Column("bits_per_value", "float", "bits for each cached key or value channel: scales, positions, state counted"),
    *_xla("prefill"),
    *_xla("decode"),
    Column("weight_bytes", "int", "of the model's arrays"),
    Column("temp_bytes", "int", "scratch of the largest program"),
    Column("peak_bytes", "int", "predicted peak: weights + peak_cache_bytes + scratch + residual stream"),
    Column("device_peak_bytes", "int", "peak_bytes_in_use of the device's allocator; null on a CPU", True),
    Column("peak_rss_bytes", "int", "peak of the child's resident memory (VmHWM)", True),
    Column("peak_rss_of", "str", "point where the peak was reset before it, else process", True),
    Column(
        "protocol",
        "str",
        "of the columns from nll to far_se: decode (the continuation token by token, as in generation) or prompt (in one step, after "
        "which only what the method did at the end of the prompt has acted)",
    ),
    Column("acts_in_decode", "str", "why the two protocols differ; no where they are the same by construction"),
    *_quality(""),
    Column(
        "far_tokens",
        "int",
        "scored tokens that dense attention predicts only with more than the nearest tokens (LongPPL's rule)",
    ),
    Column("far_nll", "float", "nll of these tokens, nats a token"),
    *_quality("prompt_"),
    Column("tasks", "json", "scores of the tasks requested by --tasks"),
    Column("task_files", "json", "sha256 of each file of --tasks"),
    Column("device", "str", "what times were measured on", True),
    Column("host", "str", "machine", True),
    Column("child_start_s", "float", "the child's start: imports and weights, s", True),
    Column("wall_s", "float", "the point from claim to row, s", True),
    Column("finished", "str", "when, UTC", True),
)
BY_NAME = {c.name: c for c in COLUMNS}

# computed when rows are read, from a row and that of its reference
RATIOS = (
    Column("cache_over_dense", "float", "cache_bytes / dense's"),
    Column("ttft_over_dense", "float", "ttft_s / dense's, same machine only", True),
    Column("decode_over_dense", "float", "decode_s / dense's, same machine only", True),
    Column("nll_minus_dense", "float", "nll - dense's, nats a token"),
    Column("nll_minus_dense_se", "float", "its standard error: the larger of se_tokens and se_passages"),
    Column("prompt_nll_minus_dense", "float", "prompt_nll - dense's, nats a token"),
    Column("prompt_nll_minus_dense_se", "float", "its standard error"),
)


def whole_row(key: str, columns: Mapping[str, Any], status: str, row: Mapping[str, Any] | None) -> Row:
    """Return every column of a point in the schema's order: known values, its status, and its row where there is one."""
    values = {**columns, **(row or {}), "key": key, "status": status}
    return {c.name: values.get(c.name) for c in COLUMNS}


def ratios(row: Mapping[str, Any], dense: Mapping[str, Any] | None) -> Row:
    """Return the columns that set a row beside its reference; None where either row has no value."""
    dense = dense or {}

    def over(name: str, same: bool = True):
        a, b = row.get(name), dense.get(name)
        return a / b if same and a and b else None

    def in_turns(name: str):
        """The ratio to dense's time of the same turns; rows of before have none, and take the dense row's."""
        a, b = row.get(name), row.get(f"dense_{name}")
        return a / b if a and b else over(name, same)

    def less(name: str):
        a, b = row.get(name), dense.get(name)
        return None if a is None or b is None else a - b

    def error(prefix: str):
        errors = [row.get(f"{prefix}{kind}") for kind in ("se_tokens", "se_passages")]
        return max((e for e in errors if e is not None), default=None)

    same = row.get("host") == dense.get("host") and row.get("device") == dense.get("device")
    return {
        "cache_over_dense": over("cache_bytes"),
        "ttft_over_dense": in_turns("ttft_s"),
        "decode_over_dense": in_turns("decode_s"),
        "nll_minus_dense": less("nll"),
        "nll_minus_dense_se": error(""),
        "prompt_nll_minus_dense": less("prompt_nll"),
        "prompt_nll_minus_dense_se": error("prompt_"),
    }


SAID_AGAIN = ("columns", "reference", "card")  # what the rest of a spec says already


def leaves(spec: Any, before: str = "") -> dict[str, Any]:
    """Return the leaves of a spec by dotted name, without what says the same again."""
    flat: dict[str, Any] = {}
    for name, value in spec.items() if isinstance(spec, Mapping) else ():
        if not before and name in SAID_AGAIN:
            continue
        flat |= leaves(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return flat
