"""A child of a sweep that runs no model and imports no JAX: what happens at a point is in its spec."""

import json
import os
import signal
import sys
import time
from pathlib import Path

from lcx.sweep.child import _end_with_parent


def row(spec, workdir):
    what = spec["what"]
    time.sleep(spec.get("seconds", 0.0))
    log = Path(workdir) / "runs.log"
    with log.open("a") as file:
        file.write(spec["columns"]["method"] + "\n")
    if what == "hang":
        time.sleep(3_600)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "abort":
        print("terminate called after throwing an instance of 'std::bad_alloc'", file=sys.stderr, flush=True)
        os.abort()
    if what == "exit":
        sys.exit(3)
    if what == "memory":
        return {"status": "oom", "message": "MemoryError"}
    return {"status": "ok", "nll": spec["columns"]["length"] / 7, "ttft_s": time.time(), "cache_bytes": 1 << 20}


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _end_with_parent()
    print("noise that must not reach the scheduler")
    print(json.dumps({"ready": {}}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps({"key": job["key"], "row": row(job["spec"], sys.argv[1])}), file=answers, flush=True)


if __name__ == "__main__":
    main()
