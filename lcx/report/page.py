"""One HTML page of a sweep: no script, nothing from outside, at most 5 MB."""

from __future__ import annotations

import base64
import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

from matplotlib.figure import Figure

from lcx.report import axes, figures, quality_panels, tables
from lcx.report.cards import Card, cards
from lcx.report.escape import Safe, el, join
from lcx.report.export import csv_text
from lcx.report.ranking import SIGMAS, rankings
from lcx.report.scores import score_tables
from lcx.report.source import Source, has_failed
from lcx.sweep.schema import COLUMNS, Row
from lcx.sweep.store import OPEN
from lcx.text import visible

LARGEST = 5_000_000  # bytes of the page
LARGEST_CSV = 1_000_000  # of the file within it
MOST_PARETO = 4  # lengths
MOST_CARDS = 100
FEW_CARDS = 10  # where more would make the page too large
MOST_LINES = 40  # of a kind in a card; a spec comes from a file, in which anything may be
MOST_SCORED = 2_000
MOST_FAILURES = 500
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c2024; --soft: #5a636d; --line: #d5dade; --tint: #f4f6f8; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --back: #15181b; --ink: #e4e7ea; --soft: #a2abb4; --line: #3a4148; --tint: #1e2226; --bad: #ff8a80; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 82rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
p { margin: .3rem 0 .8rem; max-width: 60rem; overflow-wrap: anywhere; }
nav a { margin-right: 1rem; } a { color: inherit; }
.soft, figcaption, summary small { color: var(--soft); }
figure { margin: 0 0 1.4rem; } .wide { overflow-x: auto; } .wide svg { min-width: 40rem; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: .87rem; max-width: 60rem; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1rem; }
.cards { display: grid; align-items: start; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; background: var(--tint); }
.card p { font-size: .9rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .45rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
th { background: var(--tint); white-space: normal; vertical-align: bottom; }
.n { text-align: right; } .wrap td { white-space: normal; overflow-wrap: anywhere; }
tr.bad td, .bad { color: var(--bad); }
dl { display: grid; grid-template-columns: fit-content(36%) 1fr; gap: .1rem .8rem; margin: .3rem 0; font-size: .86rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .5rem 0; } summary { cursor: pointer; }
code { font: .92em ui-monospace, "DejaVu Sans Mono", monospace; }
@media print {
  @page { size: A4 landscape; margin: 12mm; }
  :root { --back: #fff; --ink: #000; --soft: #444; --line: #bbb; --tint: #f6f6f6; --bad: #900; }
  body { padding: 0; max-width: none; font-size: 10px; } .scroll { overflow: visible; } nav, .screen { display: none; }
  table { font-size: 7.5px; } th, td { padding: .1rem .3rem; white-space: normal; } thead { display: table-header-group; }
  h2 { break-after: avoid; } figure svg { max-height: 165mm; } .wide svg { min-width: 0; }
  figure, .card, tr { break-inside: avoid; } details:not([open]) { display: none; }
}
"""


def page(source: Source, capacity: Sequence[str] = ()) -> str:
    """Return the page as HTML.

    Args:
      source: the sweep.
      capacity: GPUs whose memory is drawn as lines.

    Raises:
      UserError: no such GPU.
    """
    before = _figures(source.rows, capacity)
    known, after = cards(source), [_measured(source), _failed(source.rows)]
    text = ""
    # the first that fits; an export has the rows left out
    for most, orders, whole in ((None, 3, True), (None, 3, False), (2_000, 1, False), (100, 1, False)):
        recipes = _recipes(known, FEW_CARDS if most == 100 else MOST_CARDS)
        middle = [_tables(source.rows, most, orders, whole), *_scores(source.rows), recipes]
        text = _document(source, [before, *middle, *after])
        if len(text.encode()) <= LARGEST:
            break
    return text


def _document(source: Source, sections: Sequence[Safe]) -> str:
    title = f"lcx: {source.workdir.name or source.workdir}"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", title),
        el("style", Safe(STYLE)),
    )
    links = {
        "figures": "Figures",
        "tables": "Tables",
        **({"scores": "Task scores"} if score_tables(source.rows) else {}),
        "recipes": "Recipes",
        "measured": "How it was measured",
        "failed": "Failures",
    }
    body = el(
        "body",
        el("h1", title),
        _summary(source),
        el("nav", *(el("a", n, href=f"#{i}") for i, n in links.items())),
        *sections,
    )
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"


def _summary(source: Source) -> Safe:
    rows = source.rows
    counts = Counter(r["status"] for r in rows)
    statuses = ", ".join(f"{n} {status}" for status, n in counts.most_common())
    lengths = sorted({r["length"] for r in rows if r["length"] is not None})
    span = f"{lengths[0]:,} to {lengths[-1]:,} tokens" if lengths else "no length"
    models = ", ".join(dict.fromkeys(str(r["model"]) for r in rows))
    last = max((r["finished"] for r in rows if r["finished"]), default=None)
    parts = [
        el(
            "p",
            f"{models}: {len({r['method'] for r in rows})} recipes at {span}; {len(rows)} points: {statuses or 'none'}.",
        )
    ]
    if any(r["status"] in OPEN for r in rows):
        parts.append(
            el(
                "p",
                "Points that are todo or running have no row yet: run the sweep again with the same --workdir.",
                class_="bad",
            )
        )
    if source.odd:
        parts.append(
            el("p", f"{source.odd} values of the store were not of their column's kind and are left out.", class_="bad")
        )
    if last:
        parts.append(el("p", f"Last row: {last}", class_="soft"))
    return join(parts)


def _figures(rows: Sequence[Row], capacity: Sequence[str]) -> Safe:
    looks = axes.styles(rows)
    bars = "Seeds are averaged. "
    drawn = [
        _figure(
            "memory",
            figures.memory(rows, looks=looks),
            "Bytes of all arrays of the KV cache after the prompt, by context length. "
            "A cross on top is a point that failed, with its status. " + bars,
        ),
        _figure(
            "peak",
            figures.peak(rows, looks=looks, capacity=capacity),
            "Predicted peak: weights, caches, XLA's scratch. A cross within the axes is the predicted peak of a point that failed. "
            + ("Broken lines: memory of GPUs. " if capacity else "--capacity=h200,rtx4090 draws the memory of GPUs. "),
        ),
    ]
    wide = _figure(
        "latency",
        figures.latency(rows, looks=looks),
        "Time to first token and time of a decode step: medians; bars are the 10th to 90th percentile. " + bars,
    )
    share = [
        _figure(
            f"share{i}",
            figures.quality_of_share(rows, length=length, looks=looks),
            "Loss of likelihood against the share of the prompt that is kept or read: lower left is better. Bars: one standard error of "
            "the difference to dense on the same tokens. Methods without a budget are not drawn.",
        )
        for i, length in enumerate(quality_panels.share_lengths(rows)[::-1][:MOST_PARETO])
    ]
    longest = quality_panels.pareto_lengths(rows)[::-1][:MOST_PARETO] or [None]
    quality = [
        _figure(
            f"pareto{i}",
            figures.pareto(rows, length=length, looks=looks),
            "Loss of quality against bytes of the cache: lower left is better. Filled: no other has as few bytes and as little loss. "
            "Dotted: dense, whose loss is 0; what equals it stands on the lower edge. " + bars,
        )
        for i, length in enumerate(longest)
    ]
    heat = figures.needle(rows)
    parts = [*share, el("div", *drawn, class_="two"), wide, *quality, *_rankings(rows)]
    if heat is not None:
        parts.append(_figure("needle", heat, "Share of needles found, by depth and context length; grey: no row."))
    groups = len(axes.facets(rows))
    if groups > figures.MOST_FACETS:
        parts.append(el("p", f"Figures show {figures.MOST_FACETS} of {groups} combinations of model, dtype and batch."))
    return el("section", el("h2", "Figures"), *parts, id="figures")


def _rankings(rows: Sequence[Row]) -> list[Safe]:
    orders = rankings(rows)
    if not orders:
        return []
    caption = (
        "Order by NLL − dense's, the least loss first, as far as the errors carry it: < where all before lie apart from all after by "
        f"{SIGMAS:g} of their joint standard errors, seeds taken together; a comma where they do not."
    )
    return [el("p", caption), el("dl", *(part for text, order in orders for part in (el("dt", text), el("dd", order))))]


def _figure(name: str, fig: Figure, caption: str) -> Safe:
    # on a narrow screen several panels side by side scroll, or their text would be too small
    kind = "wide" if fig.get_figwidth() > 8 else None
    return el("figure", inline_svg(fig, name, caption), el("figcaption", caption), class_=kind)


def inline_svg(fig: Figure, name: str, label: str) -> Safe:
    """Return the figure as an SVG element of a page: its ids begin with `name`, its text and frames have the page's colour."""
    text = figures.render(fig, "svg", text_as_paths=False, facecolor="none").decode()
    root = ElementTree.fromstring(text)  # noqa: S314, matplotlib's own output
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for node in root.iter():
        node.tag = node.tag.rpartition("}")[2]
        old, node.attrib = node.attrib, {}
        for key, value in old.items():
            node.attrib[key.rpartition("}")[2]] = _svg_value(key.rpartition("}")[2], value, name)
    root.attrib |= {"role": "img", "aria-label": visible(label)}
    for size in ("width", "height", "version"):
        root.attrib.pop(size, None)
    return Safe(ElementTree.tostring(root, encoding="unicode"))


def _svg_value(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    if key == "style":
        value = value.replace(axes.INK, "currentColor").replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")
    return value.replace("url(#", f"url(#{name}-") if key in ("style", "clip-path") else value


def _tables(rows: Sequence[Row], most: int | None, orders: int, whole: bool) -> Safe:
    kept = rows if most is None else rows[:most]
    note = _more(len(rows), len(kept), "points")
    parts = []
    for name, by in list(tables.ORDERS.items())[:orders]:
        summary = el("summary", name, el("small", f" ({len(kept):,} points)"))
        parts.append(el("details", summary, tables.compared(tables.ordered(kept, by)), open=not parts or None))
    if whole:
        parts.append(el("details", el("summary", "all columns"), tables.everything(kept)))
        text = csv_text(rows).encode()
        if len(text) <= LARGEST_CSV:
            link = Safe("data:text/csv;charset=utf-8;base64," + base64.b64encode(text).decode())
            parts.append(el("p", el("a", "all columns as CSV", href=link, download="rows.csv"), class_="screen"))
    parts.append(el("details", el("summary", "what the columns mean"), tables.meanings()))
    hint = el("p", "Each order is a table of its own; a closed one is not printed.", class_="soft")
    return el("section", el("h2", "Tables"), hint, note, *parts, id="tables")


def _scores(rows: Sequence[Row]) -> list[Safe]:
    parts = tables.task_scores(rows[:MOST_SCORED])
    note = "Mean over the samples, 0 to 100; ppl and longppl are perplexities.  RULER's mean is over its 13 tasks."
    more = _more(len(rows), min(len(rows), MOST_SCORED), "points")
    return (
        [el("section", el("h2", "Task scores"), el("p", note, class_="soft"), more, *parts, id="scores")]
        if parts
        else []
    )


def _recipes(known: Sequence[Card], most: int) -> Safe:
    grid = el("div", *map(_card, known[:most]), class_="cards")
    return el("section", el("h2", "Recipes"), grid, _more(len(known), most, "recipes"), id="recipes")


def _more(count: int, most: int, what: str) -> Safe | None:
    return (
        el("p", f"The first {most:,} of {count:,} {what}; an export has all.", class_="bad") if count > most else None
    )


def _card(card: Card) -> Safe:
    statuses = ", ".join(f"{n} {status}" for status, n in card.statuses.items())
    groups = (
        [(axis, el("code", choice)) for axis, choice in card.axes],
        [(name, el("code", value)) for name, value in card.settings],
        [(f"paper: {name}", value if isinstance(value, int | float) else str(value)) for name, value in card.paper],
        [("exact", join([text, el("br")])) for text in card.exact],
    )
    lines = [line for group in groups for line in group[:MOST_LINES]]
    more = _more(max(map(len, groups)), MOST_LINES, "lines of a kind")
    lines += [("config", el("code", card.config)), ("points", statuses)]
    description = el("p", card.about) if card.about else el("p", "The config does not describe itself.", class_="soft")
    return el("div", el("h3", card.method), description, tables.pairs(lines), more, class_="card")


def _failed(rows: Sequence[Row]) -> Safe:
    failed = [r for r in rows if has_failed(r)]
    names = ("method", "model", "dtype", "batch", "length", "seed", "status", "message")
    head = el("thead", el("tr", *(el("th", "tokens" if n == "length" else n) for n in names)))
    lines = (el("tr", *(el("td", tables.plain(r[n])) for n in names)) for r in failed[:MOST_FAILURES])
    table = (
        el("div", el("table", head, el("tbody", *lines), class_="wrap"), class_="scroll")
        if failed
        else el("p", "None.")
    )
    return el("section", el("h2", "Failures"), table, _more(len(failed), MOST_FAILURES, "failures"), id="failed")


def _measured(source: Source) -> Safe:
    rows = [r for r in source.rows if r["status"] == "ok"]

    def values(name: str) -> str:
        return ", ".join(dict.fromkeys(tables.plain(r[name]) for r in rows)) or "-"

    counted = ("cache_bytes", "peak_cache_bytes", "segment_bytes")
    predicted = [c.name for c in COLUMNS if c.name.endswith("_bytes") and not c.measured and c.name not in counted]
    facts = [
        ("texts", values("text")),
        ("passages of a text", values("passages")),
        ("protocol of nll, kl and errors", values("protocol")),
        ("device", values("device")),
        ("machine", values("host")),
        ("timed prefills a point", f"{values('ttft_n')}, after {values('warmups')} untimed"),
        ("timed decode steps a point", values("decode_n")),
        ("times", "of compiled programs, until their results are there; compiling is compile_s"),
        (
            "quality",
            "of the continuations after the prompts, teacher forced: NLL of the text's tokens, KL from dense's distribution; under decode "
            "each token is a step of its own, under prompt the continuation is one step; errors are paired with dense on the same tokens",
        ),
        ("counted from arrays", ", ".join(counted)),
        ("predicted, not measured", ", ".join(predicted)),
        ("measured: another run differs", ", ".join(c.name for c in COLUMNS if c.measured)),
    ]
    parts = [tables.pairs(facts)]
    if not source.runs:
        parts.append(el("p", "There is no readable run.json: commands and versions are not known.", class_="soft"))
    for i, run in enumerate(reversed(source.runs[-20:])):
        name = f"run of {run.get('started', 'unknown time')}"
        parts.append(el("details", el("summary", name), tables.pairs(_run_facts(run)), open=i == 0 or None))
    return el("section", el("h2", "How it was measured"), *parts, id="measured")


def _run_facts(run: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the facts of a run in run.json, without points and model configs."""
    argv = run.get("argv")
    facts: list[tuple[str, Any]] = [
        ("command", el("code", shlex.join(map(str, argv)) if isinstance(argv, list) else argv))
    ]
    for name in ("git", "versions", "machine", "environment", "text", "texts", "flags"):
        facts += _flat(name, run.get(name))
    models = run.get("models")
    for name, model in models.items() if isinstance(models, dict) else ():
        facts.append(
            (f"model {visible(name, 80)}", f"sha256 {model.get('sha256') if isinstance(model, dict) else model}")
        )
    return facts[:200]


def _flat(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [(f"{name}: {visible(key, 80)}", tables.plain(v)) for key, v in value.items() if v not in (None, "", [])]
    return [] if value is None else [(name, tables.plain(value))]
