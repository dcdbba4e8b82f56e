"""lcx and Hugging Face transformers side by side: `python -m experiments.peers.compare_speed --peer_python=.venv-peers/bin/python`.

The same weights, float32, the same cores; the two take turns, so that a busy moment meets both.  Warm-up is untimed.  Prints a line for
each case and writes `--out` as JSON: medians, all times, and the ratio lcx / transformers.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import numpy as np
from absl import flags

from experiments import cli
from lcx.errors import UserError

FLAGS = flags.FLAGS
HERE = Path(__file__).parent
STEPS = 16


def define_flags() -> None:
    flags.DEFINE_string("peer_python", ".venv-peers/bin/python", "Python of the peers' environment.")
    flags.DEFINE_integer("repeats", 5, "Times that each case is run.", lower_bound=1)
    flags.DEFINE_string("out", None, "JSON file to write.")


class Peer:
    """Child process of hf_speed.py."""

    def __init__(self, python: str):
        try:
            self.child = subprocess.Popen(  # noqa: S603, the user's own interpreter
                [python, HERE / "hf_speed.py", f"--threads={os.cpu_count()}"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        except OSError as error:
            raise UserError(
                f"peer_python={python!r} cannot be run: {error.strerror}; see experiments/peers/README.md"
            ) from None
        self.versions = self.answer()

    def answer(self) -> dict:
        assert self.child.stdin is not None and self.child.stdout is not None  # noqa: S101, both are pipes
        line = self.child.stdout.readline()
        if not line:
            raise UserError("the peer's process ended; its message is above")
        return json.loads(line)

    def seconds(self, command: str) -> list[float]:
        assert self.child.stdin is not None  # noqa: S101
        print(command, file=self.child.stdin, flush=True)
        return np.atleast_1d(self.answer()["seconds"]).tolist()


class Ours:
    """The same cases in this process."""

    def __init__(self):
        from lcx.models.loading import load

        self.layers = load("smollm2-135m").layers
        self.ids = np.random.default_rng(0).integers(17, self.layers.config.vocab_size, 8_192)
        self.context = {}

    def session(self, tokens: int, new_tokens: int, steps=()):
        from lcx.recipe import Recipe
        from lcx.session import Session

        session = Session(self.layers, Recipe(), tokens, new_tokens)
        session.compile(tokens, steps)
        return session

    def prefill(self, tokens: int) -> list[float]:
        session = self.session(tokens, 0)
        start = time.perf_counter()
        session.prefill(self.ids[:tokens]).block_until_ready()
        return [time.perf_counter() - start]

    def decode(self, context: int) -> list[float]:
        if context not in self.context:
            # room for every step of every repeat: each sees a few tokens more than the peer's, which crops
            self.context[context] = self.session(context, (FLAGS.repeats + 2) * STEPS, [1])
            self.context[context].prefill(self.ids[:context])
        session, seconds = self.context[context], []
        for _ in range(STEPS):
            start = time.perf_counter()
            session.step([[5]]).block_until_ready()
            seconds.append(time.perf_counter() - start)
        return seconds


def main() -> None:
    peer, ours = Peer(FLAGS.peer_python), Ours()
    cases = {
        "prefill 512": (lambda: ours.prefill(512), ["prefill 512"]),
        "prefill 4096": (lambda: ours.prefill(4_096), ["prefill 4096"]),
        "decode at 4096": (lambda: ours.decode(4_096), [f"decode 4096 {STEPS}", f"decode_static 4096 {STEPS}"]),
    }
    rows = {}
    for name, (call, commands) in cases.items():
        call()
        for command in commands:
            peer.seconds(command)
        mine, theirs = [], {command: [] for command in commands}
        for _ in range(FLAGS.repeats):
            mine += call()
            for command in commands:
                theirs[command] += peer.seconds(command)
        # the faster of its ways is the peer
        best = min(theirs, key=lambda command: np.median(theirs[command]))
        ratio = float(np.median(mine) / np.median(theirs[best]))
        rows[name] = {"lcx_s": mine, "peer_s": theirs[best], "peer": best, "ratio": ratio}
        spread = lambda x: f"{np.median(x):.4f} s ({min(x):.4f} to {max(x):.4f})"
        print(
            f"{name:<15} lcx {spread(mine)}  transformers {spread(theirs[best])} [{best}]  lcx / transformers {ratio:.2f}",
            flush=True,
        )
    if FLAGS.out:
        versions = {p: importlib.metadata.version(p) for p in ("jax", "jaxlib")} | peer.versions
        record = {"cpus": os.cpu_count(), "machine": platform.machine(), "versions": versions, "rows": rows}
        Path(FLAGS.out).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    define_flags()
    cli.run("compare_speed", main)
