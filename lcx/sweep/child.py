"""The process that runs points: started by the scheduler, which it answers in lines of JSON.

python -m lcx.sweep.child WORKDIR [--accept_licence]
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

WATCH_S = 0.5


def main(argv: list[str]) -> None:
    """Answer jobs on stdin until it ends."""
    start = time.perf_counter()
    # the output of a library must not come between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _end_with_parent()

    def answer(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    from lcx.sweep.work import Worker

    worker = Worker(Path(argv[0]), "--accept_licence" in argv)
    imported = time.perf_counter() - start
    answer({"ready": {"import_s": imported}})
    for line in sys.stdin:
        job = json.loads(line)
        row = worker.row(job["key"], job["spec"])
        answer({"key": job["key"], "row": row | {"child_start_s": imported + worker.load_s}})


def _end_with_parent() -> None:
    """End the child with its parent: nobody would write its row after that."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
