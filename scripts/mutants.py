#!/usr/bin/env python3
"""Put each seeded fault of tests/mutants/ by itself into a copy of the tree, and report the ones that the tests let live.

Exit status: 0 when every fault fails a test, 1 when one lives or cannot be judged, 2 when there was nothing sound to judge.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "mutants"
NOT_COPIED = (".*", "__pycache__", "runs", "build", "dist", "*.egg-info")
PASSED, FAILED = 0, 1  # of pytest; the others are not verdicts


class Refused(Exception):
    """Error of one line: cause, then remedy."""


@dataclass(frozen=True)
class Mutant:
    """One seeded fault.

    Attributes:
      name: method and number in its file, from 1.
      file: relative to the root.
      old, new: text that occurs once in the file, and what replaces it.
      reason: what is wrong then.
      tests, select: files for pytest, and its -k.
    """

    name: str
    file: str
    old: str
    new: str
    reason: str
    tests: tuple[str, ...]
    select: str

    @property
    def method(self) -> str:
        return self.name.partition(":")[0]

    @property
    def run(self) -> tuple[tuple[str, ...], str]:
        return self.tests, self.select

    def apply(self, text: str) -> str:
        """Return the file's text with the fault.

        Raises:
          Refused: `old` does not occur exactly once, or changes nothing, or what results is not Python.
        """
        count = text.count(self.old)
        if count != 1:
            raise Refused(f"{self.name}: old={self.old!r} occurs {count} times in {self.file}; it must be once")
        changed = text.replace(self.old, self.new)
        if changed == text:
            raise Refused(f"{self.name}: new={self.new!r} is what {self.file} has; it must be a fault")
        try:
            compile(changed, self.file, "exec")
        except SyntaxError as error:
            raise Refused(
                f"{self.name}: {self.file} is no Python any more, {error.msg}; mend new={self.new!r}"
            ) from None
        return changed


def read(path: Path) -> list[Mutant]:
    """Return the faults of one method's file, whose form tests/mutants/README.md shows.

    Raises:
      Refused: the file is no TOML, or a key is missing or not known.
    """
    try:
        record = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise Refused(f"{path.name}: {error}") from None
    shared = {key: record[key] for key in ("tests", "select") if key in record}
    mutants = []
    for number, entry in enumerate(record.get("mutant", []), 1):
        name, fields = f"{path.stem}:{number}", shared | entry
        keys = {"file", "old", "new", "reason", "tests", "select"}
        if set(fields) != keys:
            raise Refused(f"{name}: has the keys {', '.join(sorted(fields))}; needed are {', '.join(sorted(keys))}")
        mutants.append(Mutant(name, **(fields | {"tests": tuple(fields["tests"])})))
    return mutants


def read_all() -> list[Mutant]:
    """Return the faults of all methods, in the order of their names."""
    return [mutant for path in sorted(FOLDER.glob("*.toml")) for mutant in read(path)]


def configs_of(path: Path) -> list[str]:
    """Return the names of the configs that a method's file stands for."""
    return tomllib.loads(path.read_text(encoding="utf-8"))["configs"]


def changed_files(revision: str) -> set[str]:
    """Return the files that differ from a revision, in the work tree too.

    Raises:
      Refused: git does not know the revision.
    """
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603, S607
    diff, new = git("diff", "--name-only", revision, "--"), git("ls-files", "--others", "--exclude-standard")
    if diff.returncode or new.returncode:
        raise Refused(f"--changed={revision}: git knows no such revision here; name one, or leave the flag out")
    return {*diff.stdout.splitlines(), *new.stdout.splitlines()}


def concerned(mutant: Mutant, changed: set[str]) -> bool:
    """Return True where a change touches the file of a fault, its tests or its own description."""
    return bool(changed & {mutant.file, *mutant.tests, f"tests/mutants/{mutant.method}.toml"})


def judge(tree: Path, run: tuple[tuple[str, ...], str], limit: float) -> int | None:
    """Run the tests of a fault in the copy; return pytest's exit status, None when the time is over."""
    tests, select = run
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--no-header"]
    # a compiled file of the last fault may have the size and the second of this one
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    try:
        done = subprocess.run(  # noqa: S603
            [*command, "-k", select, *tests], cwd=tree, env=environment, capture_output=True, check=False, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def hunt(mutants: list[Mutant], tree: Path, limit: float) -> Counter:
    """Return how many faults were killed, lived, or could not be judged; print a line for each."""
    sound: dict[tuple, bool] = {}
    counts = Counter()
    for mutant in mutants:
        if mutant.run not in sound:
            # a test that fails anyway kills nothing
            status = judge(tree, mutant.run, 4 * limit)
            sound[mutant.run] = status == PASSED
            if status != PASSED:
                print(f"tests   {' '.join(mutant.tests)} -k '{mutant.select}' {_why(status)} without a fault")
        if not sound[mutant.run]:
            verdict, took = "unclear", 0.0
        else:
            verdict, took = _verdict(mutant, tree, limit)
        counts[verdict] += 1
        print(f"{verdict:7} {took:5.1f} s  {mutant.name:16} {mutant.file}: {mutant.reason}", flush=True)
    return counts


def _verdict(mutant: Mutant, tree: Path, limit: float) -> tuple[str, float]:
    """Return ("killed" | "LIVES" | "unclear", seconds)."""
    path = tree / mutant.file
    text = path.read_text(encoding="utf-8")
    start = time.monotonic()
    path.write_text(mutant.apply(text), encoding="utf-8")
    try:
        status = judge(tree, mutant.run, limit)
    finally:
        path.write_text(text, encoding="utf-8")
    if status not in (PASSED, FAILED):
        print(f"tests   {' '.join(mutant.tests)} -k '{mutant.select}' {_why(status)} with {mutant.name}")
    return {PASSED: "LIVES", FAILED: "killed"}.get(status, "unclear"), time.monotonic() - start


def _why(status: int | None) -> str:
    if status is None:
        return "takes too long"
    return {1: "fails", 5: "selects no test"}.get(status, f"ends with status {status}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", help="names of files in tests/mutants/, with commas; default: all")
    parser.add_argument(
        "--changed",
        nargs="?",
        const="HEAD~1",
        metavar="REV",
        help="only faults whose files differ from REV, HEAD~1 by default",
    )
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for the tests of one fault (%(default)s)")
    flags = parser.parse_args()
    try:
        mutants = read_all()
        if flags.methods is not None:
            wanted, known = set(flags.methods.split(",")), {mutant.method for mutant in mutants}
            if wanted - known:
                raise Refused(f"--methods={flags.methods}: allowed are {', '.join(sorted(known))}")
            mutants = [mutant for mutant in mutants if mutant.method in wanted]
        if flags.changed is not None:
            changed = changed_files(flags.changed)
            mutants = [mutant for mutant in mutants if concerned(mutant, changed)]
        for mutant in mutants:
            mutant.apply((ROOT / mutant.file).read_text(encoding="utf-8"))
    except (Refused, OSError) as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="lcx_mutants_") as scratch:
        tree = Path(scratch) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
        counts = hunt(mutants, tree, flags.limit)
    print(f"mutants: {counts['killed']} killed, {counts['LIVES']} live, {counts['unclear']} unclear")
    return int(counts["killed"] != len(mutants))


if __name__ == "__main__":
    sys.exit(main())
