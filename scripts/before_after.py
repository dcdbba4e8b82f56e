"""`python scripts/before_after.py --write=FILE` records the figures of every config; `--against=FILE` compares with them.

A change of the core that means to change no figure is checked with `--against=docs/measured/before.json`.  Both run for every file of
configs/ that returns an Experiment, on a random model of 3 layers with sizes at which the method acts (SETTINGS), once with the prompt in
one step and once in chunks of 16 tokens:

  logits                  of two texts of different lengths: after the prompt, after each of 4 steps, and at each token of a step of 5
  cache_bytes             after the prompt, and after all steps
  peak_cache_bytes        measured, and predicted from shapes
  recipe_bytes            of the cache in both phases; also with the config's own sizes for Llama-3-8B (3 layers, bfloat16, 131,072 tokens)
  num_programs            of the layers, for a prefill and a decode step of one token
  recompilations          when a second pair of texts goes through the same session
  refused                 the session does not take this way of reading the prompt

With `--temp` also, for each program of a layer with the shapes of Llama-3-8B (a prefill chunk of 2,048 tokens, decode, and where a method
compresses, repack): `temp` and `alias` of XLA's memory plan, and the number of programs.  They are compiled for this machine's CPU in
float32 at 8,192 tokens, and without a GPU for the H200 in bfloat16 at 131,072 tokens (needs the wheels of the extra `plan`).

Figures are compared exactly, logits within 1e-5, the most that a different order of float32 sums should make of 3 layers.  Each difference
is a row of the table that is printed; one that docs/measured/allowed.json does not list ends the command with exit code 1.  Entries of that
file are {"config": ..., "quantity": ..., "reason": ...}; config and quantity may be patterns such as "*".  Logits depend a little on the
CPU and the version of JAX: where these are others than those of the record, record the old commit anew first.

Programs of the tiny model are compiled without most of XLA's optimisations: three times faster, and rounded more as they are written.
Sizes and runs are in before_after_runs.py: classes and fields are found by their names (`with_fields`), wherever they are nested or
defined, and what else may move is imported and called only under "adapter".  A refactoring edits that part and keeps the record.
"""

from __future__ import annotations

import datetime
import fnmatch
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# the script's own checkout, whatever version is installed
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from absl import flags
from before_after_runs import ATOL, ROOT, TINY, Compilations, method_names, record_temp, record_tiny, tiny_layers

from experiments import cli
from lcx.errors import UserError


def provenance() -> dict[str, str]:
    # words that are always the same
    words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603
    return {"commit": commit, "jax": jax.__version__, "date": datetime.datetime.now(datetime.UTC).date().isoformat()}


def record(section: str, names: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """Return quantities by config, and logits by "config, mode"."""
    quantities, logits = {}, {}
    compilations = Compilations()
    jax.config.update("jax_disable_most_optimizations", section == "tiny")
    layers = tiny_layers(TINY) if section == "tiny" else None
    for name in names:
        print(f"{section}: {name}", file=sys.stderr, flush=True)
        # the number of programs that a config compiles must not depend on the configs before it
        jax.clear_caches()
        if layers is None:
            quantities[name] = record_temp(name)
        else:
            quantities[name], played = record_tiny(name, layers, compilations)
            logits |= {f"{name}, {mode}": array for mode, array in played.items()}
    return quantities, logits


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple[str, str, Any, Any]]:
    """Return (config, quantity, before, after) of each difference; None where a side lacks the quantity."""
    rows = []
    for name in before:
        for quantity in dict.fromkeys([*before[name], *after[name]]):
            values = before[name].get(quantity), after[name].get(quantity)
            if values[0] != values[1]:
                rows.append((name, quantity, *values))
    return rows


def logit_differences(
    before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, str, Any, Any]]:
    """Return differences of logits: 0.0 and the largest absolute one; the shapes where these differ, None where a side has no logits."""
    for key in dict.fromkeys([*before, *after]):
        name, mode = key.split(", ", 1)
        shapes = [side[key].shape if key in side else None for side in (before, after)]
        if shapes[0] != shapes[1]:
            yield name, f"{mode}, logits", shapes[0], shapes[1]
            continue
        most = float(np.abs(before[key] - after[key]).max())
        if not most <= ATOL:
            yield name, f"{mode}, logits", 0.0, most


def read_allowed(path: Path) -> list[dict[str, str]]:
    """Return the intended differences.

    Raises:
      UserError: an entry without config, quantity or reason.
    """
    entries = json.loads(path.read_text(encoding="utf-8"))
    for entry in entries:
        if set(entry) != {"config", "quantity", "reason"} or not all(entry.values()):
            raise UserError(f"{path.name}: entry {entry} must have config, quantity and reason, none of them empty")
    return entries


def show(rows: list[tuple[str, str, Any, Any]], allowed: list[dict[str, str]]) -> int:
    """Print the table, and return the number of differences that are not allowed."""
    refused = 0
    for name, quantity, before, after in rows:
        reasons = [
            entry["reason"]
            for entry in allowed
            if fnmatch.fnmatchcase(name, entry["config"]) and fnmatch.fnmatchcase(quantity, entry["quantity"])
        ]
        refused += not reasons
        values = [
            "none" if v is None else f"{v:,}" if type(v) is int else f"{v:.3g}" if isinstance(v, float) else str(v)
            for v in (before, after)
        ]
        verdict = f"allowed: {reasons[0]}" if reasons else "NOT ALLOWED"
        print(f"{name:14} {quantity:56} {values[0]:>16} {values[1]:>16}  {verdict}")
    return refused


# the command


def define_flags() -> None:
    flags.DEFINE_string("write", None, "Record into this JSON file; sections that are not run stay.")
    flags.DEFINE_string("against", None, "Compare with this JSON file.")
    flags.DEFINE_string("logits", "tests/data/before_logits.npz", "Where logits are kept.")
    flags.DEFINE_string("allowed", "docs/measured/allowed.json", "Intended differences.")
    flags.DEFINE_bool("tiny", True, "The section of the tiny model.")
    flags.DEFINE_bool("temp", False, "The section of scratch memory.")
    flags.DEFINE_list("configs", None, "Compare only these, such as h2o,snapkv.")


def main() -> None:
    # figures are those of the CPU, also where there is a GPU
    jax.config.update("jax_platforms", "cpu")
    values = flags.FLAGS
    sections = [name for name in ("tiny", "temp") if values[name].value]
    if (values.write is None) == (values.against is None) or not sections:
        raise UserError("give one of --write=FILE and --against=FILE, and at least one of --tiny and --temp")
    if values.write is not None:
        if values.configs:
            raise UserError("--configs goes only with --against: a record holds every config")
        write(ROOT / values.write, ROOT / values.logits, sections)
    else:
        allowed = read_allowed(ROOT / values.allowed)
        sys.exit(compare(ROOT / values.against, ROOT / values.logits, sections, values.configs, allowed))


def write(path: Path, logits_path: Path, sections: list[str]) -> None:
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for section in sections:
        # files edited while this runs would falsify the record
        recorded = provenance()
        quantities, logits = record(section, method_names())
        kept[section] = {"recorded": recorded, "configs": quantities}
        if logits:
            np.savez_compressed(logits_path, **logits)
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


def compare(path: Path, logits_path: Path, sections: list[str], configs, allowed) -> int:
    """Return the exit code: 1 where a quantity differs that is not allowed to."""
    recorded = json.loads(path.read_text(encoding="utf-8"))
    missing = sorted(set(sections) - set(recorded))
    if missing:
        raise UserError(
            f"against={str(path.name)!r} has no section {missing}; record it: --write={path.name} --{missing[0]}"
        )
    refused = 0
    for section in sections:
        held = recorded[section]["configs"]
        unknown = sorted(set(configs or ()) - set(held))
        if unknown:
            raise UserError(f"configs={unknown}: not in the record; allowed are {', '.join(held)}")
        names = configs or list(held)
        print(f"{section}: {len(names)} configs against {recorded[section]['recorded']}")
        quantities, logits = record(section, names)
        rows = differences({name: held[name] for name in names}, quantities)
        if section == "tiny":
            with np.load(logits_path) as archive:
                before = {key: archive[key] for key in archive.files if key.split(", ", 1)[0] in names}
            rows += logit_differences(before, logits)
        failed = show(rows, allowed)
        print(f"{section}: {len(rows)} differences, {failed} of them not allowed")
        refused += failed
    return int(refused > 0)


if __name__ == "__main__":
    define_flags()
    cli.run("before_after", main)
