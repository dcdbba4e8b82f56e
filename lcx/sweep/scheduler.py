"""Scheduler of a store's jobs in child processes: starts and replaces them, ends those that hang, writes each row as it comes.

The protocol is lines of JSON.  A child says {"ready": {...}} once, then answers each {"key", "spec"} with {"key", "row"}.  This module
imports no JAX: a point that takes its child down takes nothing else with it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from lcx.errors import UserError
from lcx.sweep.schema import Row
from lcx.sweep.store import Job, Owner, Store

ISOLATE = ("point", "recipe", "none")
BEAT_S = 10.0
TICK_S = 0.2
START_S = 300.0  # a child that has not said that it is ready by then hangs
LOG_TAIL = 2_000  # characters of a dead child's last words that may be looked through

OnRow = Callable[[Job, Row], None]


class Runner(Protocol):
    """Runner of points: a child process, or a batch system's job after the other."""

    def run(self, job: Job, limit: float) -> Row:
        """Return the row of a job within `limit` seconds.  Raises ChildFailed, Stopped."""
        ...

    def kill(self) -> None:
        """End the running job."""
        ...


Launch = Callable[[int, threading.Event], Runner]  # (number of the worker, set when the user stops)


class Stopped(Exception):
    """Request of the user to stop."""


class ChildFailed(Exception):
    """Failure of a child that ended or hung; `status` of the point that it had."""

    def __init__(self, status: str, message: str):
        super().__init__(message)
        self.status = status


def _oom_kills() -> int | None:
    """Return how often the system has killed a process of this control group for memory; None where the system does not report it."""
    try:
        text = Path("/sys/fs/cgroup/memory.events").read_text()
        return int(dict(line.split() for line in text.splitlines())["oom_kill"])
    except (OSError, KeyError, ValueError):
        return None


class Child:
    """One child process and its two pipes."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str] | None, stop: threading.Event):
        self.log, self.stop = log, stop
        self.kills = _oom_kills()
        self._buffer = b""
        with log.open("ab") as errors:
            self.process = subprocess.Popen(  # noqa: S603, our own interpreter
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=env,
                # a Ctrl-C on the terminal reaches only the parent
                start_new_session=True,
            )
        try:
            self.ready: dict[str, Any] = self._answer(START_S)["ready"]
        except BaseException:
            # whatever ends the wait, a stop or a child that hangs: nobody else knows this process
            self.kill()
            raise

    def run(self, job: Job, limit: float) -> Row:
        """Return the row of a job.  Raises ChildFailed, Stopped."""
        assert self.process.stdin is not None  # noqa: S101, a pipe
        try:
            self.process.stdin.write(json.dumps({"key": job.key, "spec": job.spec}).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise self._dead() from None
        answer = self._answer(limit)
        if answer.get("key") != job.key:
            raise ChildFailed("error", f"the child answered for {answer.get('key')!r}")
        return answer["row"]

    def _answer(self, limit: float) -> dict[str, Any]:
        assert self.process.stdout is not None  # noqa: S101, a pipe
        end = time.monotonic() + limit
        pipe = self.process.stdout.fileno()
        while b"\n" not in self._buffer:
            if self.stop.is_set():
                raise Stopped
            left = end - time.monotonic()
            if left <= 0:
                self.kill()
                raise ChildFailed("timeout", f"no answer within {limit:g} s; the child was ended")
            if select.select([pipe], [], [], min(TICK_S, left))[0]:
                got = os.read(pipe, 1 << 16)
                if not got:
                    raise self._dead()
                self._buffer += got
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "fatal" in answer:
            raise UserError(answer["fatal"])
        return answer

    def _dead(self) -> ChildFailed:
        code = self.process.wait()
        words = self._last_words()
        if code < 0:
            name = signal.Signals(-code).name
            kills = _oom_kills()
            if -code == signal.SIGKILL and kills is not None and self.kills is not None and kills > self.kills:
                return ChildFailed("oom", "the system ended the child for want of memory")
            if "std::bad_alloc" in words or "Out of memory" in words or "RESOURCE_EXHAUSTED" in words:
                return ChildFailed("oom", f"the child ended with {name} out of memory")
            return ChildFailed("killed", f"the child was ended by {name}")
        return ChildFailed("error", f"the child ended with exit code {code}; its last words are in {self.log}")

    def _last_words(self) -> str:
        try:
            return self.log.read_bytes()[-LOG_TAIL:].decode("utf-8", "replace")
        except OSError:
            return ""

    def kill(self) -> None:
        """End the child at once, and the processes that it has started."""
        if self.process.poll() is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    # a request written to a dead child is lost
                    continue


def children(command: Sequence[str], logs: Path, env: dict[str, str] | None = None) -> Launch:
    """Return a launcher of child processes on this machine.

    Args:
      command: of a child.
      logs: folder for their stderr.
      env: their environment; None: this process's.
    """
    logs.mkdir(parents=True, exist_ok=True)
    return lambda number, stop: Child(command, logs / f"worker-{number}.log", env, stop)


@dataclass
class Scheduler:
    """Scheduler of the jobs that a store holds.

    Attributes:
      store: the points.
      launch: starts what runs points.
      workers: number of children side by side.
      isolate: when a child is replaced: after each "point", between groups ("recipe"), or only when it failed ("none").
      time_limit: seconds a point may take.
      on_row: called with (job, row) as each is on disk; one call at a time.
    """

    store: Store
    launch: Launch
    workers: int = 1
    isolate: str = "recipe"
    time_limit: float = 3_600.0
    on_row: OnRow = lambda job, row: None
    stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _failure: BaseException | None = None

    def run(self) -> None:
        """Run until every point has ended, or `stop` is set.

        Raises:
          UserError: the store cannot be written, or no child can start.
          Stopped: `stop` was set; claims are given back and children ended.
        """
        owners = [Owner.here(i) for i in range(self.workers)]
        threads = [threading.Thread(target=self._guard, args=(o, i), daemon=True) for i, o in enumerate(owners)]
        for thread in threads:
            thread.start()
        last = time.monotonic()
        while any(t.is_alive() for t in threads):
            # short waits, so that a signal's handler runs at once
            for thread in threads:
                thread.join(TICK_S / 2)
            if time.monotonic() - last > BEAT_S and not self.stop.is_set():
                last = time.monotonic()
                for owner in owners:
                    self._try(lambda owner=owner: self.store.beat(owner))
        for owner in owners:
            self._try(lambda owner=owner: self.store.release(owner))
        if self._failure is not None:
            raise self._failure
        if self.stop.is_set():
            raise Stopped

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except UserError as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._failure = self._failure or error
        self.stop.set()

    def _guard(self, owner: Owner, number: int) -> None:
        try:
            self._work(owner, number)
        except Stopped:
            return
        except BaseException as error:  # noqa: BLE001, it is raised again in run()
            self._fail(error)

    def _work(self, owner: Owner, number: int) -> None:
        child: Runner | None = None
        group: str | None = None
        try:
            while not self.stop.is_set():
                job = self.store.claim(owner, group if self.isolate == "recipe" else None)
                if job is None:
                    if self.store.unfinished() == 0:
                        return
                    # the remaining points run elsewhere, or wait for their references
                    self.stop.wait(TICK_S)
                    continue
                if child is not None and (self.isolate == "point" or (self.isolate == "recipe" and job.group != group)):
                    child.kill()
                    child = None
                group = job.group
                began = time.monotonic()
                row: Row
                try:
                    if child is None:
                        child = self.launch(number, self.stop)
                    row = child.run(job, self.time_limit)
                except ChildFailed as failed:
                    row = {"status": failed.status, "message": str(failed)}
                row["wall_s"] = time.monotonic() - began
                row["host"] = owner.host
                row["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
                if row["status"] != "ok" and child is not None:
                    # whatever state it is in, the next point shall not inherit it
                    child.kill()
                    child = None
                if self.store.finish(owner, job.key, row):
                    with self._lock:
                        self.on_row(job, row)
        finally:
            if child is not None:
                child.kill()
