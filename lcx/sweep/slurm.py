"""Points as jobs of a batch system, through submitit (extra `slurm`).

Only the process that submits touches the store: SQLite's WAL needs one machine.  A job gets a spec and gives a row back through
submitit's folder, `<workdir>/slurm`.  submitit pickles both; the folder is as trusted as the code that runs there.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcx.errors import UserError
from lcx.sweep.scheduler import ChildFailed, Launch, Stopped
from lcx.sweep.schema import Row
from lcx.sweep.store import Job

POLL_S = 0.5


def run_point(workdir: Path, key: str, spec: Mapping[str, Any], accept_licence: bool) -> Row:
    """Run one point: the function of a batch job."""
    import time

    start = time.perf_counter()
    from lcx.sweep.work import Worker

    worker = Worker(workdir, accept_licence)
    imported = time.perf_counter() - start
    row = worker.row(key, spec)
    return row | {"child_start_s": imported + worker.load_s}


class BatchJobs:
    """Runner that submits one job a point and waits for it."""

    def __init__(self, executor, workdir: Path, accept_licence: bool, stop: threading.Event):
        self.executor, self.workdir, self.accept_licence, self.stop = executor, workdir, accept_licence, stop
        self.now = None

    def run(self, job: Job, limit: float) -> Row:
        # the time limit is the batch system's: a job may wait long for its turn
        self.now = self.executor.submit(run_point, self.workdir, job.key, job.spec, self.accept_licence)
        while not self.now.done():
            if self.stop.wait(POLL_S):
                raise Stopped
        state = str(self.now.state)
        error = self.now.exception()
        if error is None:
            return self.now.result()
        status = {"TIMEOUT": "timeout", "OUT_OF_MEMORY": "oom"}.get(state)
        if status is None:
            status = "error" if type(error).__name__ == "FailedJobError" else "killed"
        raise ChildFailed(status, f"job {self.now.job_id} {state}: {' '.join(str(error).split())[:400]}")

    def kill(self) -> None:
        if self.now is not None and not self.now.done():
            self.now.cancel(check=False)


def batch_jobs(
    cluster: str, workdir: Path, time_limit: float, parameters: Mapping[str, Any], accept_licence: bool = False
) -> Launch:
    """Return a launcher of a cluster's jobs.

    Args:
      cluster: "slurm"; "local" and "debug" are submitit's executors of this machine.
      workdir: of the sweep, on a file system that the jobs see.
      time_limit: seconds of a job.
      parameters: of submitit's `update_parameters`, such as slurm_partition.
      accept_licence: as in `lcx.load`.

    Raises:
      UserError: submitit is not installed, there is no Slurm, or a parameter is unknown.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(f"launcher={cluster!r} needs submitit; install the extra: pip install 'lcx[slurm]'") from None
    try:
        executor = submitit.AutoExecutor(folder=workdir / "slurm", cluster=cluster)
        executor.update_parameters(**{"timeout_min": max(1, round(time_limit / 60)), **parameters})
    except (RuntimeError, NameError, ValueError, TypeError) as error:
        raise UserError(f"launcher={cluster!r}: {' '.join(str(error).split())}") from None
    return lambda number, stop: BatchJobs(executor, workdir.resolve(), accept_licence, stop)
