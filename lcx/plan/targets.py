"""Compile for GPUs that are not installed: the facts that XLA needs of each, and the compiled program with its memory plan.

XLA's GPU compiler runs on any x86_64 Linux machine with the wheels of the extra `plan`; its buffer assignment is the one that a run
would have.  It says nothing about speed.  Its assembler, ptxas, is that of the wheels wherever they are installed: what a kernel
spills depends on the version, and a CUDA toolkit of the machine's would be taken first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lcx.errors import UserError, nearest
from lcx.text import MIB


@dataclass(frozen=True)
class GpuTarget:
    """One GPU, as XLA's GpuTargetConfigProto describes it.

    Attributes:
      name: value of the flag --target.
      capability: compute capability, (major, minor).
      cores: streaming multiprocessors.
      fpus_per_core: float32 units of each.
      threads_per_core: resident at most.
      shared_bytes, shared_optin_bytes: shared memory of a core, and what one block may ask for.
      bandwidth: of the memory, bytes a second, vendor's figure.
      l2_bytes: L2 cache.
      clock_ghz: boost clock.
      memory_bytes: memory that the driver reports; read on the card for the H200, usual figures for the others.
      bf16_flops: dense bfloat16 operations a second, vendor's figure.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    fpus_per_core: int
    threads_per_core: int
    shared_bytes: int
    shared_optin_bytes: int
    bandwidth: float
    l2_bytes: int
    clock_ghz: float
    memory_bytes: int
    bf16_flops: float

    @property
    def proto(self) -> str:
        """Return the text form of XLA's GpuTargetConfigProto."""
        return f"""gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
          shared_memory_per_core: {self.shared_bytes} threads_per_core_limit: {self.threads_per_core}
          core_count: {self.cores} fpus_per_core: {self.fpus_per_core}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {int(self.bandwidth)} l2_cache_size: {self.l2_bytes} clock_rate_ghz: {self.clock_ghz}
          device_memory_size: {self.memory_bytes} shared_memory_per_block_optin: {self.shared_optin_bytes}
          cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }} device_description_str: "{self.name}" """


# capability, cores, float32 units and threads a core, shared memory of a core and a block, bandwidth, L2, clock, memory, bfloat16 FLOP/s
# fmt: off
_TABLE = {
    "h200": ((9, 0), 132, 128, 2_048, 233_472, 232_448, 4.8e12, 60 * MIB, 1.98, 143_771 * MIB, 989e12),
    "h100": ((9, 0), 132, 128, 2_048, 233_472, 232_448, 3.35e12, 50 * MIB, 1.98, 81_559 * MIB, 989e12),
    "a100-80gb": ((8, 0), 108, 64, 2_048, 167_936, 166_912, 2.039e12, 40 * MIB, 1.41, 81_920 * MIB, 312e12),
    "rtx4090": ((8, 9), 128, 128, 1_536, 102_400, 101_376, 1.008e12, 72 * MIB, 2.52, 24_564 * MIB, 165e12),
    "rtx3090": ((8, 6), 82, 128, 1_536, 102_400, 101_376, 0.936e12, 6 * MIB, 1.70, 24_576 * MIB, 71e12),
    "l40s": ((8, 9), 142, 128, 1_536, 102_400, 101_376, 0.864e12, 96 * MIB, 2.52, 46_068 * MIB, 362e12),
}
# fmt: on
TARGETS = {name: GpuTarget(name, *row) for name, row in _TABLE.items()}


def gpu_target(name: str) -> GpuTarget:
    """Return the target of this name.

    Raises:
      UserError: there is none; names the nearest.
    """
    if name not in TARGETS:
        raise UserError(f"target={name!r}: allowed are {', '.join(TARGETS)}{nearest(name, TARGETS)}")
    return TARGETS[name]


@cache
def _wheels() -> Path | None:
    spec = find_spec("nvidia")
    places = None if spec is None else spec.submodule_search_locations
    folders = [Path(place) / "cu13" for place in places or ()]
    return next((folder for folder in folders if (folder / "bin" / "ptxas").is_file()), None)


def wheel_compiler() -> Path | None:
    """Return the folder of the wheels' CUDA compiler (bin/ptxas, nvvm/libdevice), first on PATH from now on; None without the wheels.

    Mosaic GPU looks for ptxas on the PATH when it compiles its first kernel, and remembers it; XLA's flags do not reach it.
    """
    root = _wheels()
    if root is None:
        return None
    first, path = str(root / "bin"), os.environ.get("PATH", os.defpath)
    # each time: a caller may have put the environment back
    if path.split(os.pathsep)[0] != first:
        os.environ["PATH"] = os.pathsep.join([first, path])
    return root


@cache
def compile_device(target: GpuTarget):
    """Return a device that can be compiled for and not run on.

    Raises:
      UserError: the wheels of the extra `plan` are not installed, or do not load.
    """
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(
            topology_name=target.name, platform="cuda", topology="1x1x1", target_config=target.proto
        )
    # the plugin raises whatever its loader meets
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"target={target.name!r} needs XLA's GPU compiler, which does not load here ({reason}); install the extra: "
            "pip install 'lcx[plan]'"
        ) from None
    return topology.devices[0]


def abstract(tree, target: GpuTarget | None = None):
    """Return the shapes and dtypes of the arrays (or shapes) in `tree`, placed on the target; None: on this machine's own device."""
    place = {} if target is None else {"sharding": SingleDeviceSharding(compile_device(target))}
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.result_type(x), **place), tree)


def compile_for(
    target: GpuTarget | None,
    program,
    args: Sequence[Any],
    static: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
):
    """Compile a jitted program for a target from shapes; no array is made.

    Args:
      target: one of TARGETS; None: this machine's own device.
      program: result of `jax.jit`; its donated arguments stay donated.
      args: arrays, or anything with shape and dtype, in pytrees.
      static: static arguments by name.
      options: XLA's flags for this compilation, name -> value.

    Returns:
      The executable: `memory_analysis()` gives argument, output, alias and temp bytes.

    Raises:
      UserError: as `compile_device`.
    """
    if target is not None and (root := wheel_compiler()) is not None:
        # of XLA's own kernels; JAX would take that of the variable CUDA_ROOT
        options = {"xla_gpu_cuda_data_dir": str(root)} | (options or {})
    traced = program.trace(*abstract(tuple(args), target), **(static or {}))
    lowered = traced.lower(**({} if target is None else {"lowering_platforms": ("cuda",)}))
    return lowered.compile(compiler_options=options)
