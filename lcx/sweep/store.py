"""Points and their rows on disk: one SQLite file that several processes of a machine share.

Every point is there from the start with its status.  A claim is one transaction, a row another, synced before it counts: a killed sweep
loses nothing it had finished, and no point runs twice at a time.  WAL needs one machine: jobs on other machines hand their rows to the
process that submitted them.  This module imports no JAX.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lcx.errors import UserError
from lcx.sweep.schema import STATUSES, VERSION, Row

FILE = "rows.sqlite"
STALE_S = 60.0  # a claim of another machine without a heartbeat for so long is taken over
BUSY_S = 30.0  # how long a lock of another process is waited for
OPEN = ("todo", "running")

_TABLE = f"""
CREATE TABLE IF NOT EXISTS points (
  key TEXT PRIMARY KEY, place INTEGER NOT NULL, spec TEXT NOT NULL, grp TEXT NOT NULL, reference TEXT,
  status TEXT NOT NULL DEFAULT 'todo' CHECK (status IN {OPEN + STATUSES}),
  row TEXT, owner TEXT, host TEXT, pid INTEGER, born TEXT, heartbeat REAL
) STRICT
"""


@dataclass(frozen=True)
class Job:
    """Point in the form that scheduler and store share.

    Attributes:
      key: hash of the point.
      spec: JSON of what the child needs to resolve the same point.
      group: jobs of one group may share a child that was started for one of them.
      reference: key of the point that must have ended before this one starts, or None.
    """

    key: str
    spec: Mapping[str, Any] = field(hash=False)
    group: str = ""
    reference: str | None = None


@dataclass(frozen=True)
class Owner:
    """Worker that claims points: process, its start time (a process number is used again), and a name within it."""

    name: str
    host: str
    pid: int
    born: str

    @classmethod
    def here(cls, worker: int = 0) -> Owner:
        pid = os.getpid()
        return cls(f"{socket.gethostname()}:{pid}:{worker}", socket.gethostname(), pid, process_start(pid) or "")


def process_start(pid: int) -> str | None:
    """Return the start of a process of this machine, in ticks since boot; None without such a process, or where none is reported."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _alive(pid: int, born: str) -> bool:
    if Path("/proc/self/stat").exists():
        return process_start(pid) == born
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


class Store:
    """Store of a sweep's points in `<workdir>/rows.sqlite`.

    Raises:
      UserError: the folder cannot be written, or the file is damaged, no such store, or one of another version.
    """

    def __init__(self, workdir: Path, create: bool = True):
        self.path = workdir / FILE
        if not create and not self.path.exists():
            raise UserError(f"workdir={str(workdir)!r} holds no sweep: it has no {FILE}")
        try:
            workdir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"workdir={str(workdir)!r} cannot be made: {error.strerror}") from None
        with self._open() as db:
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, VERSION):
                raise UserError(
                    f"workdir: {self.path} has schema {version}, this version reads {VERSION}; give another --workdir"
                )
            verdict = db.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                raise UserError(_damaged(self.path, verdict))
            db.execute(_TABLE)
            db.execute(f"PRAGMA user_version = {VERSION}")

    @contextmanager
    def _open(self, needed: int = 0) -> Iterator[sqlite3.Connection]:
        db = None
        try:
            db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
            _use_wal(db)
            db.execute("PRAGMA synchronous = FULL")
            db.execute("BEGIN IMMEDIATE")
            yield db
            db.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            raise UserError(_explain(self.path, error, needed)) from None
        finally:
            if db is not None:
                # an open transaction is rolled back
                db.close()

    def add(self, jobs: Sequence[Job]) -> None:
        """Add the missing jobs, in their order; present ones keep their row."""
        with self._open(sum(len(json.dumps(j.spec)) for j in jobs)) as db:
            for place, j in enumerate(jobs):
                db.execute(
                    "INSERT INTO points (key, place, spec, grp, reference) VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                    (j.key, place, json.dumps(j.spec, sort_keys=True), j.group, j.reference),
                )

    def replace(self, points: Mapping[str, Job]) -> list[Job]:
        """Put new jobs, to be run, in the places of old ones, and return the old; their rows go to `replaced.jsonl` beside the store."""
        old = [(job, row) for job, _, row in self.points() if job.key in points]
        lines = [
            json.dumps({"key": job.key, "spec": job.spec, "row": row}, sort_keys=True)
            for job, row in old
            if row is not None
        ]
        if lines:
            with (self.path.parent / "replaced.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
        with self._open(sum(len(json.dumps(j.spec)) for j in points.values())) as db:
            for key, j in points.items():
                db.execute(
                    "UPDATE points SET key = ?, spec = ?, grp = ?, reference = ?, status = 'todo', row = NULL, owner = NULL WHERE key = ?",
                    (j.key, json.dumps(j.spec, sort_keys=True), j.group, j.reference, key),
                )
        return [job for job, _ in old]

    def take(self, other: Store) -> None:
        """Copy the rows of points that both stores have and this one has not run."""
        rows = {job.key: (status, row) for job, status, row in other.points() if row is not None}
        with self._open(sum(len(json.dumps(row)) for _, row in rows.values())) as db:
            for key, (status, row) in rows.items():
                db.execute(
                    "UPDATE points SET status = ?, row = ? WHERE key = ? AND row IS NULL",
                    (status, json.dumps(row, sort_keys=True), key),
                )

    def claim(self, owner: Owner, group: str | None = None) -> Job | None:
        """Claim the next point that nobody has and whose reference has ended, one of `group` first; None: there is none now."""
        with self._open() as db:
            self._free_dead(db)
            claimed = db.execute(
                "SELECT key, spec, grp, reference FROM points AS p WHERE status = 'todo' AND (reference IS NULL OR NOT EXISTS "
                "(SELECT 1 FROM points AS r WHERE r.key = p.reference AND r.status IN ('todo', 'running'))) "
                "ORDER BY grp IS NOT ?, place LIMIT 1",
                (group,),
            ).fetchone()
            if claimed is None:
                return None
            key, spec, grp, reference = claimed
            db.execute(
                "UPDATE points SET status = 'running', owner = ?, host = ?, pid = ?, born = ?, heartbeat = ? WHERE key = ?",
                (owner.name, owner.host, owner.pid, owner.born, time.time(), key),
            )
            return Job(key, json.loads(spec), grp, reference)

    @staticmethod
    def _free_dead(db: sqlite3.Connection) -> None:
        own_host, now = socket.gethostname(), time.time()
        for key, host, pid, born, beat in db.execute(
            "SELECT key, host, pid, born, heartbeat FROM points WHERE status = 'running'"
        ).fetchall():
            if (not _alive(pid, born)) if host == own_host else (now - beat > STALE_S):
                db.execute("UPDATE points SET status = 'todo', owner = NULL WHERE key = ?", (key,))

    def beat(self, owner: Owner) -> None:
        """Record that the worker still lives, for its claims."""
        with self._open() as db:
            db.execute(
                "UPDATE points SET heartbeat = ? WHERE owner = ? AND status = 'running'", (time.time(), owner.name)
            )

    def release(self, owner: Owner) -> None:
        """Release the unfinished claims of the owner."""
        with self._open() as db:
            db.execute(
                "UPDATE points SET status = 'todo', owner = NULL WHERE owner = ? AND status = 'running'", (owner.name,)
            )

    def finish(self, owner: Owner, key: str, row: Row) -> bool:
        """Write the row of a claimed point; it is on disk when this returns.  False: the claim was lost, nothing is written."""
        if row["status"] not in STATUSES:
            raise ValueError(f"status={row['status']!r} is not one of {STATUSES}")
        text = json.dumps(row, allow_nan=False, sort_keys=True)
        with self._open(len(text)) as db:
            done = db.execute(
                "UPDATE points SET status = ?, row = ?, owner = NULL WHERE key = ? AND owner = ? AND status = 'running'",
                (row["status"], text, key, owner.name),
            )
            return done.rowcount == 1

    def reset(self, statuses: Sequence[str]) -> int:
        """Make points that ended with these statuses ready to run again, and return their number."""
        marks = ",".join("?" * len(statuses))
        with self._open() as db:
            query = f"UPDATE points SET status = 'todo', row = NULL WHERE status IN ({marks})"  # noqa: S608, marks only
            return db.execute(query, tuple(statuses)).rowcount

    def unfinished(self) -> int:
        with self._open() as db:
            return db.execute("SELECT COUNT(*) FROM points WHERE status IN ('todo', 'running')").fetchone()[0]

    def jobs(self) -> list[Job]:
        """Return all points in their order."""
        with self._open() as db:
            stored = db.execute("SELECT key, spec, grp, reference FROM points ORDER BY place").fetchall()
        return [Job(key, json.loads(spec), grp, reference) for key, spec, grp, reference in stored]

    def rows(self) -> dict[str, Row]:
        """Return key -> row of every point that has ended, in the sweep's order."""
        with self._open() as db:
            stored = db.execute("SELECT key, row FROM points WHERE row IS NOT NULL ORDER BY place").fetchall()
        return {key: json.loads(row) for key, row in stored}

    def points(self) -> list[tuple[Job, str, Row | None]]:
        """Return (job, status, row or None) of every point, in the sweep's order."""
        with self._open() as db:
            stored = db.execute("SELECT key, spec, grp, reference, status, row FROM points ORDER BY place").fetchall()
        return [
            (Job(key, json.loads(spec), grp, reference), status, None if row is None else json.loads(row))
            for key, spec, grp, reference, status, row in stored
        ]


def _use_wal(db: sqlite3.Connection) -> None:
    """Switch to WAL.  SQLite does not wait for a lock here as it does elsewhere, and two sweeps may make one folder at once."""
    end = time.monotonic() + BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            busy = (getattr(error, "sqlite_errorname", "") or "").startswith("SQLITE_BUSY")
            if not busy or time.monotonic() > end:
                raise
            time.sleep(0.01)


def salvage(path: Path) -> list[tuple[Job, str, Row | None]]:
    """Return the readable rows of a damaged store, one by one; nothing is written to it."""
    readable = []
    db = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
    try:
        count = db.execute("SELECT MAX(rowid) FROM points").fetchone()[0] or 0
    except sqlite3.DatabaseError:
        count = 100_000
    broken = 0
    for rowid in range(1, count + 1):
        try:
            got = db.execute(
                "SELECT key, spec, grp, reference, status, row FROM points WHERE rowid = ?", (rowid,)
            ).fetchone()
            if got is not None:
                key, spec, grp, reference, status, row = got
                row = None if row is None else json.loads(row)
                readable.append((Job(key, json.loads(spec), grp, reference), status, row))
        except (sqlite3.DatabaseError, ValueError):
            broken += 1
            if broken > 1_000:
                # not a single page is readable from here on
                break
    db.close()
    return readable


def _damaged(path: Path, what: str) -> str:
    what = " ".join(str(what).split())
    return (
        f"workdir: {path} is damaged ({what}); python -m experiments.export --salvage --workdir={path.parent} --out=FILE.csv "
        "writes what is readable; then give another --workdir"
    )


def _explain(path: Path, error: sqlite3.Error, needed: int) -> str:
    name = getattr(error, "sqlite_errorname", "") or ""
    if name.startswith(("SQLITE_FULL", "SQLITE_IOERR")):
        # WAL, page and index around the text of the row
        room = needed + 64 * 1024
        return (
            f"workdir: {path} cannot be written ({error}): about {room:,} bytes are needed; rows before this one are safe, "
            "free some room and run the same command again"
        )
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return _damaged(path, str(error))
    return f"workdir: {path} cannot be used: {error}; give another --workdir"
