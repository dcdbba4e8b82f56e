"""A sweep of fake points, `python sweep_parent.py WORKDIR COUNT WORKERS`: prints a line for each row that is on disk."""

import sys
from pathlib import Path

from lcx.sweep.scheduler import Scheduler, children
from lcx.sweep.store import Job, Store

HERE = Path(__file__).parent


def jobs(count, what="ok", seconds=0.0):
    """Points of methods a, b and c; each after the first of its length waits for that."""
    found = []
    for i in range(count):
        method, length = "abc"[i % 3], 128 * (1 + i // 3)
        columns = {"method": method, "model": "m", "dtype": "float32", "batch": 1, "length": length, "seed": 0}
        spec = {"what": what, "seconds": seconds, "columns": columns}
        found.append(Job(f"key{i:04}", spec, method, None if i % 3 == 0 else f"key{i - i % 3:04}"))
    return found


def main(workdir, count, workers):
    assert not any(name.split(".")[0] in ("jax", "jaxlib", "flax") for name in sys.modules)
    store = Store(workdir)
    store.add(jobs(count, seconds=0.002))
    Scheduler(
        store,
        children([sys.executable, str(HERE / "sweep_child.py"), str(workdir)], workdir / "logs"),
        workers=workers,
        on_row=lambda job, row: print(job.key, flush=True),
    ).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
