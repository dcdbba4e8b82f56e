"""Compile a kernel for the H200, which need not be installed, and read the report of ptxas."""

import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax

from lcx.plan.targets import TARGETS, compile_for

SHARED_LIMIT = TARGETS["h200"].shared_optin_bytes  # 232,448: of one block


@dataclass(frozen=True)
class Report:
    """Compiler's figures for the Mosaic GPU kernels of a function; the worst of them where there are several.

    Attributes:
      kernels: number of kernels.
      registers: of a thread at launch; `set_max_registers` moves them between warpgroups later, and spills count either way.
      spill_stores, spill_loads, stack: bytes of a thread.
      shared: bytes of a block, static and dynamic.
      wgmma: every kernel has a wgmma instruction.
      ptx: their PTX, one string each.
    """

    kernels: int
    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared: int
    wgmma: bool
    ptx: tuple[str, ...]

    def check(self, wgmma: bool = True):
        """Return the report.

        Raises:
          AssertionError: a spill, too much shared memory, or (`wgmma`) a kernel without the instruction.
        """
        if self.spill_stores or self.spill_loads:
            raise AssertionError(f"{self.spill_stores} bytes of registers are spilled: {self}")
        if self.shared > SHARED_LIMIT:
            raise AssertionError(f"{self.shared} bytes of shared memory, a block may have {SHARED_LIMIT}")
        if wgmma and not self.wgmma:
            raise AssertionError("a kernel has no wgmma")
        return self

    def __str__(self):
        return (
            f"{self.kernels} kernels, {self.registers} registers, {self.spill_stores} B spilled, {self.shared} B shared"
        )

    __repr__ = __str__


def _one(pattern: str, text: str, name: str) -> list[int]:
    match = re.search(pattern, text)
    if not match:
        raise AssertionError(f"{name} has no line like {pattern!r}; it says: {text[:500]}")
    return [int(x) for x in match.groups()]


def compile_kernel(fn: Callable, *shapes) -> Report:
    """Compile `fn` for the H200 from shapes (`jax.ShapeDtypeStruct`, or arrays), in pytrees.

    Raises:
      UserError: as `compile_for`.
      AssertionError: there is no Mosaic GPU kernel in it, or the reports lack a line that is looked for.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
        with mock.patch.dict(os.environ, flags):
            # a new function: jit must not answer with a program that was compiled without these flags
            compile_for(TARGETS["h200"], jax.jit(lambda *args: fn(*args)), shapes)
        reports = sorted(Path(folder).glob("*.ptxas"))
        if not reports:
            raise AssertionError("no report of ptxas: no Mosaic GPU kernel was compiled")
        rows, ptx = [], []
        for path in reports:
            text, code = path.read_text(), path.with_suffix(".ptx").read_text()
            stack, stores, loads = _one(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text, path.name
            )
            (registers,) = _one(r"Used (\d+) registers", text, path.name)
            (static,) = _one(r"(\d+) bytes smem", text, path.name) if "bytes smem" in text else (0,)
            resources = path.with_suffix(".resources.txt").read_text()
            (dynamic,) = _one(r"smem_scratch_bytes=(\d+)", resources, f"{path.stem}.resources.txt")
            barriers = sum(
                int(n) * int(times) for n, times in re.findall(r"num_barriers=(\d+)[^)]*\): (\d+)", resources)
            )
            rows.append((registers, stores, loads, stack, static + dynamic + 8 * barriers, "wgmma.mma_async" in code))
            ptx.append(code)
    worst = [max(column) for column in zip(*rows, strict=True)]
    return Report(len(rows), *worst[:5], wgmma=all(row[5] for row in rows), ptx=tuple(ptx))
