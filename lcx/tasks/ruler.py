"""RULER's 13 tasks.  Hsieh et al. 2024, arXiv:2404.06654: structure and scoring as published, wording of our own, fixed.

A budget of tokens covers worked example, context, question, answer prefix, chat template and the generated tokens.  Fine-grained tasks
use at least 95 % of it; a coarse one is short by less than one unit of its haystack, `TaskSpec.unit`.  500 samples a task and length,
seed 42 and greedy decoding are RULER's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lcx.errors import UserError, nearest
from lcx.tasks import counting, documents, niah, tracing
from lcx.tasks.sample import Sample
from lcx.tasks.sizing import Encode, Form, fit_samples


@dataclass(frozen=True)
class TaskSpec:
    """Specification of a task.

    Attributes:
      form: how samples are built and sized.
      unit: unit by which the haystack grows.
      fine_from: budget in tokens from which prompt and answer take at least 95 % of it, counted with SmolLM2's tokenizer.
    """

    form: Form
    unit: str
    fine_from: int


_NOISE, _WORD, _NEEDLE, _CARD = "line of noise", "word of prose", "needle", "document"
_TASKS = {
    "niah_single_1": (niah.form, _NOISE, 512),
    "niah_single_2": (niah.form, _WORD, 512),
    "niah_single_3": (niah.form, _WORD, 512),
    "niah_multikey_1": (niah.form, _WORD, 512),
    "niah_multikey_2": (niah.form, _NEEDLE, 512),
    "niah_multikey_3": (niah.form, _NEEDLE, 2_048),
    "niah_multivalue": (niah.form, _WORD, 512),
    "niah_multiquery": (niah.form, _WORD, 512),
    "vt": (tracing.form, _NOISE, 512),
    "cwe": (counting.cwe, "uncommon word", 512),
    "fwe": (counting.fwe, "coded word", 512),
    "qa_1": (documents.qa_1, _CARD, 1_024),
    "qa_2": (documents.qa_2, _CARD, 1_024),
}
RULER = {name: TaskSpec(make(name), unit, fine_from) for name, (make, unit, fine_from) in _TASKS.items()}


def generate(
    task: str,
    encode: Encode,
    budget: int,
    num_samples: int = 500,
    seed: int = 42,
    *,
    template: Callable[[str], str] | None = None,
) -> list[Sample]:
    """Return samples of one task; the same arguments give the same bytes on every machine.

    Args:
      task: a name of RULER.
      encode: a tokenizer with `encode(text)`, or a function from a text to its tokens or to their number.  Where the model wants a bos
        token it must count it (`task_scores.encoder` does).
      budget: tokens of prompt and answer together.
      num_samples: at least 1.
      seed: not negative.
      template: chat format around everything up to the question; the answer prefix comes after it.  Default: none, a new line.

    Raises:
      UserError: an unknown task, a number out of range, or a budget that is too small; the message gives one that works.
    """
    if task not in RULER:
        raise UserError(f"task={task!r}; allowed are {', '.join(RULER)}{nearest(task, RULER)}")
    if num_samples < 1 or seed < 0:
        raise UserError(f"num_samples={num_samples} must be at least 1 and seed={seed} at least 0")
    number = list(RULER).index(task)
    keys = [(seed, number, i) for i in range(num_samples)]
    return fit_samples(RULER[task].form, encode, budget, keys, (seed, number), template)
