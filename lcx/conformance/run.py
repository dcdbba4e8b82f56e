"""Runs of the checks: each ends as a result in one line, whatever the method does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

from lcx import checks
from lcx.axes import Aux
from lcx.conformance import behaviour, limits, storage
from lcx.conformance.measure import Failed, Measure, Skipped
from lcx.conformance.small_model import quick_compilation
from lcx.conformance.subject import CHUNK, PROMPT, Subject
from lcx.experiment import Experiment
from lcx.recipe import Recipe
from lcx.tracebacks import place

CHECKS: dict[str, Callable[..., None]] = {
    "acts": behaviour.acts,
    "finite": behaviour.finite,
    "causality": behaviour.causality,
    "padding": behaviour.padding,
    "batch mates": behaviour.batch_mates,
    "empty slots": behaviour.empty_slots,
    "limit": limits.limit,
    "one by one": limits.one_by_one,
    "short prompts": limits.short_prompts,
    "chunk sizes": limits.chunk_sizes,
    "bytes": storage.bytes_of_arrays,
    "budgets": storage.budgets,
    "no recompilation": behaviour.no_recompilation,
}
# these compile programs that no other check needs
THOROUGH: dict[str, Callable[..., None]] = {
    "any chunk": behaviour.any_chunk,
    "alone": behaviour.alone,
    "long steps": limits.long_steps,
    "bfloat16": limits.bfloat16,
    "heads": limits.heads,
    "in place": storage.in_place,
}


@dataclass(frozen=True)
class Result:
    """Result of one check.

    Attributes:
      check: its name.
      status: "pass", "fail" or "skip".
      difference: the largest difference that it measured, in logits or channels of the residual stream; None where nothing was compared.
      why: one line: what holds, what does not, or why the check says nothing.
      error: the exception of the method that ended the check, or None.
    """

    check: str
    status: str
    difference: float | None
    why: str
    error: Exception | None = field(default=None, repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Return True unless the check failed."""
        return self.status != "fail"

    def __str__(self) -> str:
        number = "" if self.difference is None else f"{self.difference:.2g}"
        return f"{self.status.upper():<4}  {self.check:<16}  {number:<8}  {self.why}"


def run_check(subject: Subject, name: str, **settings) -> Result:
    """Return the result of one check.

    Args:
      subject: the method; runs that it has made already are not made again.
      name: of CHECKS or THOROUGH.
      settings: of the check, such as sizes.
    """
    function = (CHECKS | THOROUGH)[name]
    measure = Measure()
    try:
        function(subject, measure, **settings)
    except Skipped as reason:
        return Result(name, "skip", measure.largest, str(reason))
    except Failed as failure:
        return Result(name, "fail", measure.largest, str(failure))
    # whatever a user's method raises is the result, with its place; the exception goes along
    except Exception as error:
        at = place(error)
        text = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        layout = "; held keys are [B,R,D,S], new ones [B,R,N,D]" if "shape" in text else ""
        return Result(name, "fail", measure.largest, text + (f" ({at})" if at else "") + layout, error)
    return Result(name, "pass", measure.largest, inspect.getdoc(function).splitlines()[0])  # pyrefly: ignore


def check(
    method: Recipe | Experiment,
    *,
    aux: Aux | None = None,
    prompt: int = PROMPT,
    chunk: int = CHUNK,
    thorough: bool = False,
    on_result: Callable[[Result], None] | None = None,
) -> list[Result]:
    """Check what must hold for every method, on a random model of 3 layers, 6 query heads and 2 KV heads of 32 channels.

    Parts act at their class's `small` sizes where it has them, else at their own; one without them whose budget is above the prompt takes
    a quarter of the prompt.  Each check runs a session or two in a few seconds, most of them compilation.

    Args:
      method: recipe, or the experiment of a config file; its model, aux and schedule are not used.
      aux: the method's arrays for the small model, one dict a layer; None: random numbers for what the recipe declares.
      prompt: tokens of the longer of two prompts, at least 33; more where the method does nothing below.
      chunk: tokens of a prefill step.
      thorough: also the checks of THOROUGH, which take as long again.
      on_result: called with each result as it is there.

    Returns:
      One result a check, in the order of CHECKS.

    Raises:
      UserError: a size out of range, or aux that does not fit the small model.
    """
    checks.kind("method", method, Recipe, Experiment)
    recipe = method.recipe if isinstance(method, Experiment) else method
    subject = Subject(recipe, aux, prompt, chunk)
    results = []
    with quick_compilation():
        # sizes that do not go together would end every check in the same words
        subject.session(subject.at("small"))
        for name in CHECKS | (THOROUGH if thorough else {}):
            results.append(run_check(subject, name))
            if on_result is not None:
                on_result(results[-1])
    return results
