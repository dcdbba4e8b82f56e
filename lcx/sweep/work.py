"""Rows from specs: the part of a child that loads models and runs points."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from lcx.errors import UserError
from lcx.models.loading import load
from lcx.sweep.bench import Bench
from lcx.sweep.points import Loaded, resolve
from lcx.sweep.schema import Row


class Worker:
    """Worker that loads the model of a spec, when it changes, and runs the spec's point.

    Attributes:
      load_s: seconds that loading the present model took.
    """

    def __init__(self, workdir: Path, accept_licence: bool = False):
        self.streams, self.accept_licence = workdir / "streams", accept_licence
        self.load_s = 0.0
        self._bench: Bench | None = None
        self._loaded = ("", "")

    def row(self, key: str, spec: Mapping[str, Any]) -> Row:
        try:
            bench = self._bench_for(spec["model"], spec["dtype"])
            known = Loaded(bench.model.config, bench.model.sha256)
            point = resolve(spec, known)
            if point.key != key:
                raise UserError("the config or the model's file was changed while the sweep ran; run it again")
            reference = None if spec["reference"] is None else resolve(spec["reference"], known)
        except UserError as error:
            return {"status": "error", "message": str(error)}
        row = bench.row(point, reference)
        # programs of another point are of no use to the next, and each takes memory maps, of which Linux has 65,530
        jax.clear_caches()
        return row

    def _bench_for(self, model: str, dtype: str) -> Bench:
        if self._bench is None or self._loaded != (model, dtype):
            self._bench = None
            start = time.perf_counter()
            self._bench = Bench(load(model, dtype, self.accept_licence), self.streams)
            jax.block_until_ready(self._bench.model.layers.embed)
            self.load_s = time.perf_counter() - start
            self._loaded = (model, dtype)
        return self._bench
