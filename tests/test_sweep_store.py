"""Store and scheduler under faults: killed parents and children, hangs, full disks, damaged files.  No model and no JAX runs here."""

import json
import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from sweep_parent import jobs

from lcx.errors import UserError
from lcx.sweep.scheduler import Scheduler, Stopped, children
from lcx.sweep.store import STALE_S, Job, Owner, Store, salvage

HERE = Path(__file__).parent
ROOT = HERE.parent
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}"}


def start(workdir, count=12, workers=1):
    return subprocess.Popen(
        [sys.executable, HERE / "sweep_parent.py", workdir, str(count), str(workers)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
    )


def scheduler(workdir, found, **settings):
    store = Store(workdir)
    store.add(found)
    command = [sys.executable, str(HERE / "sweep_child.py"), str(workdir)]
    return Scheduler(store, children(command, workdir / "logs", ENV), **settings)


def texts(workdir):
    """key -> (status, the row's bytes), after an integrity check; nothing where the store was killed before it had its table."""
    db = sqlite3.connect(workdir / "rows.sqlite")
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'points'").fetchone():
        db.close()
        return {}
    found = {key: (status, row) for key, status, row in db.execute("SELECT key, status, row FROM points")}
    db.close()
    return found


def ran(workdir):
    """How often a point of each method began."""
    log = workdir / "runs.log"
    return Counter(log.read_text().split()) if log.exists() else Counter()


# ---- killed at random


def kill_again_and_again(workdir, kills, workers, seed, count=12):
    """Kill the parent at random times until it has been killed `kills` times in sweeps that had work left; sweep after sweep."""
    chance = random.Random(seed)  # noqa: S311, not for secrets
    done, folder = 0, 0
    while done < kills:
        here, safe = workdir / str(folder), {}
        folder += 1
        for _ in range(kills):
            process = start(here, count, workers)
            try:
                # from before the first line of Python to after the last row
                process.wait(chance.uniform(0.05, 0.6))
            except subprocess.TimeoutExpired:
                process.kill()
                done += 1
            shown = process.communicate()[0].split()
            if (here / "rows.sqlite").exists() and process.returncode != 0:
                after = texts(here)
                assert all(after.get(key) == row for key, row in safe.items()), "a row that was on disk has changed"
                # a line that came out whole is a promise
                assert all(after[key][0] == "ok" for key in shown if len(key) == len("key0000"))
                safe = {key: row for key, row in after.items() if row[0] == "ok"}
            if process.returncode == 0 or done >= kills:
                break
        process = start(here, count, workers)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        final = texts(here)
        assert len(final) == count and all(status == "ok" for status, _ in final.values())
        assert all(final[key] == row for key, row in safe.items())
    return done


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_sweep_killed_at_random_loses_no_row(tmp_path, workers):
    assert kill_again_and_again(tmp_path, 10, workers, seed=workers) >= 10


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_killed_two_hundred_times_loses_no_row(tmp_path, workers):
    assert kill_again_and_again(tmp_path, 100, workers, seed=10 + workers) >= 100


def test_children_of_a_killed_parent_end(tmp_path):
    found = jobs(1, "hang")
    script = (
        "import sys; from pathlib import Path; from test_sweep_store import scheduler; from sweep_parent import jobs\n"
        f"scheduler(Path({str(tmp_path)!r}), jobs(1, 'hang')).run()"
    )
    process = subprocess.Popen([sys.executable, "-c", script], env=ENV)
    while not ran(tmp_path):
        time.sleep(0.02)
    alive = subprocess.run(["pgrep", "-f", f"sweep_child.py {tmp_path}"], capture_output=True, text=True).stdout
    assert alive.split()
    process.kill()
    process.wait()
    for _ in range(100):
        alive = subprocess.run(["pgrep", "-f", f"sweep_child.py {tmp_path}"], capture_output=True, text=True).stdout
        if not alive.split():
            break
        time.sleep(0.1)
    assert not alive.split()
    # its claim is free at once: the process that held it is gone
    store = Store(tmp_path)
    assert store.claim(Owner.here()).key == found[0].key


# ---- several at once


def test_two_sweeps_of_one_folder_run_every_point_once(tmp_path):
    both = [start(tmp_path, 30, 2) for _ in range(2)]
    shown = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], [errors for _, errors in shown]
    assert ran(tmp_path) == {"a": 10, "b": 10, "c": 10}
    assert len(texts(tmp_path)) == 30
    # each row was shown by the one that wrote it
    assert sorted(key for out, _ in shown for key in out.split()) == sorted(j.key for j in jobs(30))


def test_a_point_waits_for_its_reference_and_for_nothing_else(tmp_path):
    store = Store(tmp_path)
    store.add(jobs(6))
    one, two = Owner.here(0), Owner.here(1)
    assert [store.claim(one).key for _ in range(2)] == ["key0000", "key0003"]
    assert store.claim(two) is None and store.unfinished() == 6
    assert store.finish(one, "key0000", {"status": "error", "message": "a reference that failed has ended, too"})
    assert store.claim(two, "c").key == "key0002"  # its own group first
    assert store.claim(two, "c").key == "key0001"
    assert store.claim(two) is None


def test_claims_of_other_machines_are_kept_until_their_heart_stops(tmp_path, monkeypatch):
    store = Store(tmp_path)
    store.add(jobs(1))
    far = Owner("far:1:0", "far", 1, "1")
    assert store.claim(far).key == "key0000"
    assert store.claim(Owner.here()) is None
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + STALE_S - 1)
    assert store.claim(Owner.here()) is None
    store.beat(far)
    monkeypatch.setattr(time, "time", lambda: now + 2 * STALE_S - 2)
    assert store.claim(Owner.here()) is None
    monkeypatch.setattr(time, "time", lambda: now + 2 * STALE_S + 2)
    assert store.claim(Owner.here()).key == "key0000"
    # what the other one brings now comes too late
    assert not store.finish(far, "key0000", {"status": "ok"})
    assert store.rows() == {}


# ---- what can happen to a child


@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        ("hang", "timeout", "no answer within 1 s"),
        ("kill", "killed", "ended by SIGKILL"),
        ("abort", "oom", "out of memory"),
        ("exit", "error", "exit code 3"),
        ("memory", "oom", "MemoryError"),
    ],
)
@pytest.mark.parametrize("isolate", ["none", "point"])
def test_a_point_that_fails_is_a_row_and_the_sweep_goes_on(tmp_path, what, status, message, isolate):
    found = jobs(6)
    found[1] = Job(found[1].key, {**found[1].spec, "what": what}, found[1].group, found[1].reference)
    run = scheduler(tmp_path, found, isolate=isolate, time_limit=1.0)
    run.run()
    rows = run.store.rows()
    assert [r["status"] for r in rows.values()] == ["ok", status, "ok", "ok", "ok", "ok"]
    assert message in rows["key0001"]["message"]
    assert rows["key0001"]["wall_s"] > 0 and rows["key0001"]["host"]
    # and can be tried again
    assert run.store.reset([status]) == 1 and run.store.unfinished() == 1


@pytest.mark.parametrize(("isolate", "count"), [("point", 6), ("recipe", 3), ("none", 1)])
def test_isolation_says_how_many_children_there_are(tmp_path, isolate, count, monkeypatch):
    import lcx.sweep.scheduler as module

    made = []

    class Counted(module.Child):
        def __init__(self, *args):
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr(module, "Child", Counted)
    # a group's points come one after the other although the order is by length
    scheduler(tmp_path, jobs(6), isolate=isolate).run()
    assert len(made) == count


def test_stopping_gives_claims_back_and_ends_children(tmp_path):
    run = scheduler(tmp_path, jobs(3, "hang"), workers=1)
    threading.Timer(0.5, run.stop.set).start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        run.run()
    assert time.monotonic() - began < 5
    assert {status for _, status, _ in run.store.points()} == {"todo"}


def test_a_child_that_cannot_start_is_a_row_with_its_log(tmp_path):
    run = scheduler(tmp_path, jobs(1))
    run.launch = children([sys.executable, "-c", "raise SystemExit('no such model')"], tmp_path / "logs")
    run.run()
    (row,) = run.store.rows().values()
    assert row["status"] == "error" and "logs" in row["message"]
    assert "no such model" in (tmp_path / "logs" / "worker-0.log").read_text()


def test_scheduling_costs_little(tmp_path):
    # bar: at most 0.1 s a point for store, claims and scheduling
    run = scheduler(tmp_path, jobs(60))
    began = time.monotonic()
    run.run()
    assert (time.monotonic() - began) / 60 < 0.1


# ---- disks


FILL = """
import resource, sys
from pathlib import Path
from lcx.errors import UserError
from lcx.sweep.store import Owner, Store
from sweep_parent import jobs
workdir, limit = Path(sys.argv[1]), int(sys.argv[2])
try:
    store = Store(workdir)
    store.add(jobs(60))
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    me = Owner.here()
    while (job := store.claim(me)) is not None:
        store.finish(me, job.key, {"status": "ok", "message": "x" * 2_000})
        print(job.key, flush=True)
except UserError as error:
    sys.exit(f"{error}")
"""


def fill(workdir, limit):
    return subprocess.run(
        [sys.executable, "-c", FILL, workdir, str(limit)], capture_output=True, text=True, env=ENV, timeout=60
    )


def cut_points(tmp_path, count):
    """Limits from what the empty store takes to what the full one does."""
    least = fill(tmp_path / "size", resource.RLIM_INFINITY)
    assert least.returncode == 0, least.stderr
    return [20_000 + i * 240_000 // count for i in range(count)]


def check_cut(workdir, limit):
    done = fill(workdir, limit)
    shown = done.stdout.split()
    if done.returncode != 0:
        (line,) = done.stderr.strip().splitlines()
        assert "rows.sqlite" in line and "bytes are needed" in line
    rows = texts(workdir)
    assert all(rows[key][0] == "ok" for key in shown)
    again = fill(workdir, resource.RLIM_INFINITY)
    assert again.returncode == 0, again.stderr
    assert Counter(status for status, _ in texts(workdir).values()) == {"ok": 60}
    return done.returncode != 0


def test_a_full_disk_is_one_line_and_earlier_rows_are_safe(tmp_path):
    refused = [check_cut(tmp_path / str(n), n) for n in cut_points(tmp_path, 4)]
    assert sum(refused) >= 2


@pytest.mark.slow
def test_a_full_disk_at_twenty_cut_points(tmp_path):
    assert sum(check_cut(tmp_path / str(n), n) for n in cut_points(tmp_path, 20)) >= 15


def damaged(workdir, where):
    """A store of 60 rows with a page overwritten."""
    assert fill(workdir, resource.RLIM_INFINITY).returncode == 0
    db = sqlite3.connect(workdir / "rows.sqlite")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    db.close()
    path = workdir / "rows.sqlite"
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(int(size * where) // 4096 * 4096)
        file.write(b"\xff" * 4096)
    return path


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.9])
def test_a_damaged_store_is_refused_and_what_is_readable_comes_out(tmp_path, where):
    path = damaged(tmp_path / "run", where)
    copy = tmp_path / "copy.sqlite"
    shutil.copy(path, copy)
    with pytest.raises(UserError, match=r"rows\.sqlite is damaged .*export --salvage") as error:
        Store(tmp_path / "run").rows()
    assert "\n" not in str(error.value)
    rows = salvage(path)
    if where > 0:
        assert len(rows) >= 20
    for job, status, row in rows:
        assert status in ("ok", "todo") and (row is None or row["message"] == "x" * 2_000)
        assert job.spec["columns"]["model"] == "m"
    assert path.read_bytes() == copy.read_bytes()


def test_other_files_are_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no sweep"):
        Store(tmp_path / "none", create=False)
    (tmp_path / "rows.sqlite").write_text("not a database at all, but a text that is long enough to be read as a page")
    with pytest.raises(UserError, match="is damaged|cannot be used"):
        Store(tmp_path)
    other = tmp_path / "other"
    Store(other)
    db = sqlite3.connect(other / "rows.sqlite")
    db.execute("PRAGMA user_version = 1")
    db.close()
    with pytest.raises(UserError, match="has schema 1, this version reads 2"):
        Store(other)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        Store(file / "run")


def test_rows_hold_only_json(tmp_path):
    store = Store(tmp_path)
    store.add(jobs(1))
    me = Owner.here()
    store.claim(me)
    with pytest.raises(ValueError, match="Out of range float"):
        store.finish(me, "key0000", {"status": "ok", "nll": float("nan")})
    with pytest.raises(ValueError, match="status='done'"):
        store.finish(me, "key0000", {"status": "done"})
    assert store.finish(me, "key0000", {"status": "ok", "nll": 1.0})
    assert json.loads(texts(tmp_path)["key0000"][1]) == {"status": "ok", "nll": 1.0}
