"""Devices of a plan: this machine's own device, or GPUs of one kind that need not be installed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from lcx.errors import UserError, nearest
from lcx.measure.memory import machine_bytes
from lcx.plan.targets import MIB, TARGETS, GpuTarget, compile_device

NAME = re.compile(r"(?:([1-9][0-9]{0,3})x)?(.+)")
CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """Devices that share one model.

    Attributes:
      name: value of the flag --device, such as h200, 2xh200 or cpu.
      target: target of the compilation; None: this machine's own device.
      count: number of devices; every one holds 1 / count of the KV heads and of the matrices.
      memory_bytes: memory of each.
    """

    name: str
    target: GpuTarget | None
    count: int
    memory_bytes: int


def device(name: str) -> Device:
    """Return the device of this name: cpu, one of TARGETS, or several of them, as 2xh200.

    Raises:
      UserError: there is none; names the nearest.
    """
    match = NAME.fullmatch(name)
    count, kind = (int(match[1] or 1), match[2]) if match else (1, name)
    if kind == CPU and count == 1:
        memory = machine_bytes()
        if memory is None:
            raise UserError("device='cpu': this system does not report its memory; choose a GPU target")
        return Device(name, None, 1, memory)
    if kind not in TARGETS:
        allowed = (CPU, *TARGETS)
        raise UserError(
            f"device={name!r}: allowed are {', '.join(allowed)}, and N of a GPU as 2xh200{nearest(kind, allowed)}"
        )
    return Device(name, TARGETS[kind], count, TARGETS[kind].memory_bytes)


def check_compiler(found: Device) -> None:
    """Raise UserError where programs cannot be compiled for the device: the extra `plan` is missing."""
    if found.target is not None:
        compile_device(found.target)


def budget_bytes(found: Device, reserve_mib: int) -> int:
    """Return the bytes that arrays and scratch may take on each device."""
    return found.memory_bytes - reserve_mib * MIB
