"""Methods of lcx: a table of every config, made from the configs themselves, and the card of one.

python -m lcx.methods               the table, as the README has it
python -m lcx.methods --name=snapkv  one method: its axes, settings, exact limits, arrays and the paper's figures
python -m lcx.methods --compose=minference,quest  whether two go together, what they are then, and why not
python -m lcx.methods --matrix      every pair, as docs/compositions.md has it
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from lcx.composition import compose
from lcx.config_files import all_configs, load_config
from lcx.errors import UserError, nearest
from lcx.experiment import Experiment
from lcx.model_config import ModelConfig

AXES = {"compress": "policy (end of prompt)"}
# a card prints the shapes of arrays for these sizes
SHAPE = ModelConfig("smollm2-135m", 30, 576, 9, 3, 64, 1_536, 49_152, 8_192)


def experiments() -> dict[str, Experiment]:
    """Return every config of one method, by name."""
    loaded = {path.stem: load_config(path) for path in all_configs()}
    return {name: value for name, value in loaded.items() if isinstance(value, Experiment)}


def axes(experiment: Experiment) -> list[str]:
    """Return the axes on which a method makes a choice, each once."""
    chosen: dict[str, None] = {}
    for choice in experiment.recipe.describe():
        axis = choice.axis.split(" of ")[0]
        chosen[AXES.get(axis, axis)] = None
    if any(len(chain) > 1 for chain in experiment.recipe.chains):
        chosen["chain"] = None
    if experiment.schedule != Experiment(experiment.recipe).schedule:
        chosen["schedule"] = None
    # dense attention chooses nothing
    return [axis for axis in chosen if experiment.recipe != type(experiment.recipe)()]


def table() -> str:
    """Return the README's table: config, description, axes, verification."""
    lines = ["| config | method | axes | verified |", "| --- | --- | --- | --- |"]
    for name, experiment in experiments().items():
        description = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\1](https://arxiv.org/abs/\1)", experiment.about)
        verified = ", ".join(("limit", *experiment.verified))
        lines.append(f"| [`{name}`](configs/{name}.py) | {description} | {', '.join(axes(experiment))} | {verified} |")
    return "\n".join(lines)


def card(name: str) -> str:
    """Return the card of one method in words.

    Raises:
      UserError: there is no such config; names the nearest.
    """
    known = experiments()
    if name not in known:
        raise UserError(f"name={name!r}: no such method; allowed are {', '.join(known)}{nearest(name, known)}")
    return "\n".join(_card(name, known[name]))


def _card(name: str, experiment: Experiment) -> Iterator[str]:
    yield f"{name}: {experiment.about}"
    yield f"config: configs/{name}.py"
    for choice in experiment.recipe.describe():
        settings = ", ".join(f"{key}={value}" for key, value in choice.settings.items())
        yield f"{choice.axis}: {choice.name}({settings})" if settings else f"{choice.axis}: {choice.name}"
        if choice.exact:
            yield f"  equals dense attention: {choice.exact[0].lower()}{choice.exact[1:]}"
    yield f"schedule: {experiment.schedule}"
    for array, declared in experiment.recipe.arrays(SHAPE).items():
        optional = ", optional" if declared.optional else ""
        yield f"array: {array}, {declared.full(SHAPE)} for SmolLM2-135M, per {declared.per}{optional}"
    for figure, value in experiment.paper.items():
        yield f"paper: {figure}: {value}"
    yield f"verified: {', '.join(('limit', *experiment.verified))}"


def composed(names: str) -> str:
    """Return what two methods, `A,B`, are together, in words.

    Raises:
      UserError: they do not go together, with the reason; or there is no such config.
    """
    known = experiments()
    pair = names.split(",")
    if len(pair) != 2:
        raise UserError(f"compose={names!r}: allowed are two methods with a comma between")
    for name in pair:
        if name not in known:
            raise UserError(f"compose={name!r}: no such method; allowed are {', '.join(known)}{nearest(name, known)}")
    try:
        joined = compose(*(known[name] for name in pair))
    except UserError as error:
        raise UserError(f"{' and '.join(pair)} do not go together: {error}") from None
    lines = [
        f"{' and '.join(pair)} go together: lcx.compose(lcx.load_config({pair[0]!r}), lcx.load_config({pair[1]!r}))"
    ]
    for choice in joined.recipe.describe():
        settings = ", ".join(f"{key}={value}" for key, value in choice.settings.items())
        lines.append(f"{choice.axis}: {choice.name}({settings})")
    return "\n".join([*lines, f"schedule: {joined.schedule}"])


def matrix() -> str:
    """Return the table of every pair of methods, with the reasons of those that do not go together."""
    known = {name: e for name, e in experiments().items() if e.recipe != type(e.recipe)()}
    reasons: dict[str, int] = {}
    lines = ["| | " + " | ".join(known) + " |", "| --- |" + " --- |" * len(known)]
    for i, (name, first) in enumerate(known.items()):
        cells = []
        for j, second in enumerate(known.values()):
            cell = ""
            if j < i:
                try:
                    compose(first, second)
                    cell = "+"
                except UserError as error:
                    cell = str(reasons.setdefault(str(error), len(reasons) + 1))
            cells.append(cell)
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())])


def main(words: list[str]) -> int:
    """Print the table, or what the argument asks for."""
    try:
        if not words:
            print(table())
        elif len(words) == 1 and words[0].startswith("--name="):
            print(card(words[0].removeprefix("--name=")))
        elif len(words) == 1 and words[0].startswith("--compose="):
            print(composed(words[0].removeprefix("--compose=")))
        elif words == ["--matrix"]:
            print(matrix())
        else:
            raise UserError(
                f"arguments {' '.join(words)!r}: allowed are --name=METHOD, --compose=A,B, --matrix, or nothing for the table"
            )
    except UserError as error:
        print(f"methods: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
