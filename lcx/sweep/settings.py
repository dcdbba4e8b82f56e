"""Settings that all points of a sweep share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lcx import checks
from lcx.errors import UserError
from lcx.measure import protocols
from lcx.tasks import local
from lcx.tasks.sample import QUESTIONS

TASKS = ("ppl", "longppl", "passkey", "needle", "ruler")


@dataclass(frozen=True)
class Settings:
    """Settings that all points of a sweep share, but for the text, which a point has one of.

    Attributes:
      continuation: tokens scored after the prompt of each passage.
      passages: of the text, for each text of a batch; each is a prompt and its continuation.
      protocols: how continuations are fed, of `lcx.measure.protocols`; `decode` is that of the columns nll and kl where it is one of them.
      near: tokens just before the continuation that dense attention may read when tokens are sought that need more than them.
      decode_steps: timed steps of one token.
      repeats: timed prefills, in turns with dense attention's.
      warmups: untimed prefills before them, and untimed decode steps.
      text: a name of `lcx.texts`, or the path of a UTF-8 file.
      tasks: further quality figures, of TASKS, and files of {context, question, answers} that end in .jsonl.
      samples: of each task; a file has its own lines.
      questions: of the tasks that ask: "seen" while the prompt is compressed, "unseen", or both.
      memory_limit: bytes; a point whose predicted peak is above is not run.  None: the memory of the device or the machine.
      allow_extrapolation: lengths beyond the model's context.
    """

    continuation: int = 256
    passages: int = 2
    protocols: tuple[str, ...] = protocols.PROTOCOLS
    near: int = 64
    decode_steps: int = 24
    repeats: int = 3
    warmups: int = 1
    text: str = "pride_and_prejudice"
    tasks: tuple[str, ...] = ()
    samples: int = 10
    questions: tuple[str, ...] = QUESTIONS
    memory_limit: int | None = None
    allow_extrapolation: bool = False

    def __post_init__(self):
        for name in ("continuation", "passages", "near", "decode_steps", "repeats", "samples"):
            checks.whole(name, getattr(self, name), 1)
        checks.whole("warmups", self.warmups, 0)
        for protocol in self.protocols:
            protocols.check(protocol)
        if not self.protocols or len(set(self.protocols)) < len(self.protocols):
            raise UserError(f"protocol={self.protocols!r}: give at least one, each once")
        # the columns without a prefix are those of decode where that is asked for
        object.__setattr__(self, "protocols", tuple(p for p in protocols.PROTOCOLS if p in self.protocols))
        for task in self.tasks:
            if task not in TASKS and not task.endswith(local.SUFFIX):
                raise UserError(f"tasks={task!r}; allowed are {', '.join(TASKS)} and files that end in {local.SUFFIX}")
        if (
            not self.questions
            or len(set(self.questions)) < len(self.questions)
            or not set(self.questions) <= set(QUESTIONS)
        ):
            raise UserError(f"questions={self.questions!r}: give {' or '.join(QUESTIONS)}, each once")

    @property
    def task_files(self) -> tuple[str, ...]:
        """Files among the tasks."""
        return tuple(task for task in self.tasks if task.endswith(local.SUFFIX))


def settings_of(spec: Mapping[str, Any]) -> Settings:
    """Return the settings of a point's spec."""
    given: dict[str, Any] = {**spec["settings"]}
    for name in ("tasks", "protocols", "questions"):
        given[name] = tuple(given[name])
    return Settings(**given)
