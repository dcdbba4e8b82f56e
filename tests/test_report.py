"""Page, figures, comparison and export of a sweep: what they show, and that no text in a store is ever more than text."""

import base64
import csv
import io
import json
import math
import re
import sqlite3
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from lcx.config_files import all_configs, load_config
from lcx.errors import UserError
from lcx.report import axes, cards, figures, heat, quality_panels, scores, source, tables, terminal, write_report
from lcx.report.compare import compare
from lcx.report.escape import csv_cell, el, plot_text
from lcx.report.export import csv_text, export
from lcx.report.page import LARGEST, MOST_CARDS, inline_svg, page
from lcx.report.tables import ORDERS, ordered
from lcx.sweep.rows import read_rows
from lcx.sweep.schema import BY_NAME
from lcx.sweep.store import FILE, Job, Owner, Store
from lcx.text import visible

ROOT = Path(__file__).parent.parent
METHODS = {"dense": (1.0, 0.0), "int4": (0.3, 0.01), "window": (0.25, 2.5), "h2o": (0.26, 0.3)}

PAYLOADS = [
    # markup
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "' onmouseover='alert(1)",
    "<svg><script>alert(1)</script></svg>",
    "</title><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "</svg><iframe src=//evil.example></iframe>",
    "--><script>alert(1)</script>",
    "]]><script>alert(1)</script>",
    "<a href=javascript:alert(1)>x</a>",
    "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "<base href=https://evil.example/>",
    "<meta http-equiv=refresh content=0;url=https://evil.example>",
    "<link rel=stylesheet href=https://evil.example/a.css>",
    "<style>@import 'https://evil.example/a.css';</style>",
    "<object data=https://evil.example></object>",
    "<form action=https://evil.example><input name=a></form>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "<details open ontoggle=alert(1)>",
    "<math href=javascript:alert(1)>x</math>",
    "url(https://evil.example/a.png)",
    "expression(alert(1))",
    "<!--",
    "<![CDATA[x",
    "<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]>",
    "&b;",
    # formulas
    "=1+1",
    "=cmd|'/C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1+1",
    "\r=1+1",
    " =1+1",
    '=HYPERLINK("https://evil.example")',
    "＝1+1",
    '"=1+1',
    "a\n=1+1",
    # terminals
    "\x1b[31mred\x1b[0m",
    "\x1b]0;title\x07",
    "\x1b]8;;https://evil.example\x1b\\link\x1b]8;;\x1b\\",
    "\x9b31m",
    "a\x08\x08b",
    "a\rb",
    "\x00",
    "\x7f",
    "\u202egnp.exe",
    "\u200b\ufeff\u2066",
    "\ud800",
    "[red]rich[/red]",
    "[link=https://evil.example]x[/link]",
    # paths, mathematics, lengths
    "../../etc/passwd",
    "/etc/passwd",
    "..\\..\\x.py",
    "$\\frac{1}{0}$ \\$ $x",
    "_hidden",
    "%s%n{0}{x}" + "é" * 3,
    "x" * 5_000,
]
FREE = ("message", "method", "model", "dtype", "schedule", "peak_rss_of", "device", "host", "finished")


def columns_of(method="dense", length=512, model="tiny", dtype="float32", batch=1, seed=0):
    return {
        "method": method,
        "model": model,
        "dtype": dtype,
        "batch": batch,
        "length": length,
        "prompt": length - 256,
        "seed": seed,
        "schedule": "OneShot()",
    }


def ok_row(length, share=1.0, kl=0.0, slow=1.0, **other):
    ttft, decode, size = length * 1e-3 * slow, (0.03 + length * 1e-6) * slow, int(length * 46_080 * share)
    row = {
        "status": "ok",
        **{"ttft_s": ttft, "ttft_p10_s": ttft * 0.98, "ttft_p90_s": ttft * 1.02, "ttft_n": 5, "warmups": 1},
        **{"decode_s": decode, "decode_p10_s": decode * 0.99, "decode_p90_s": decode * 1.03, "decode_n": 24},
        **{"cache_bytes": size, "recipe_bytes": size, "peak_cache_bytes": size, "weight_bytes": 5 * 10**8},
        **{"temp_bytes": 10**7, "peak_bytes": 51 * 10**7 + size, "segment_bytes": {"all": [size, size]}},
        **{"nll": 3.1 + kl, "kl": kl, "top1_agreement": max(0.0, 1 - kl), "bits_per_value": 32 * share},
        **{"device": "cpu, 2 cores", "host": "box", "finished": "2026-11-25T01:00:00Z", "wall_s": 20.0},
        "tasks": {"needle": {"lengths": [length], "depths": [0, 50, 100], "scores": [[100.0, 100 - 20 * kl, 50.0]]}},
    }
    return row | other


def fill(workdir, points):
    """A store with (columns, row or None, more of the spec) of each point; the first of each cell is the reference."""
    store, first, jobs, rows = Store(workdir), {}, [], {}
    for i, (columns, row, more) in enumerate(points):
        key = f"{i:016x}"
        at = tuple(columns[n] for n in ("model", "dtype", "batch", "length", "seed"))
        spec = {
            "config": f"configs/{columns['method']}.py",
            "changes": {},
            "settings": {},
            "columns": columns,
            "recipe": "",
            **more,
        }
        jobs.append(Job(key, spec, "", first.get(at)))
        first.setdefault(at, key)
        rows[key] = row
    store.add(jobs)
    owner = Owner.here()
    for _ in jobs:
        job = store.claim(owner)
        if job is not None and rows[job.key] is not None:
            assert store.finish(owner, job.key, rows[job.key])
    return store


def sweep(workdir, lengths=(512, 1_024), methods=METHODS, slow=1.0, change=None, seeds=(0,), **cell):
    """A store of plausible rows; `change` takes (columns, row) and returns the row."""
    points = []
    for seed in seeds:
        for length in lengths:
            for method, (share, kl) in methods.items():
                columns = columns_of(method, length, seed=seed, **cell)
                row = ok_row(length, share, kl * (1 + 0.1 * seed), slow)
                points.append((columns, row if change is None else change(columns, row), {}))
    return fill(workdir, points)


def failing(columns, row):
    if columns["method"] == "h2o" and columns["length"] == 1_024:
        return {"status": "oom_predicted", "message": "predicted peak 9, limit 8", "peak_bytes": 9 * 10**9}
    return row


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.words, self.inside = [], [], [], None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return "\n".join(self.words)


TAGS = set(
    "html head meta title style body h1 h2 h3 p nav a section div figure figcaption details summary small table thead tbody tr th td dl dt "
    "dd code br svg g defs path use rect text tspan clippath image".split()
)


def check_harmless(html):
    """Nothing in the page runs, loads or leaves it."""
    found = Reader(html)
    assert set(found.tags) <= TAGS, set(found.tags) - TAGS
    for tag, name, value in found.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "srcset", "action", "formaction", "srcdoc", "background")
        if name in ("href", "xlink:href"):
            assert value.startswith(("#", "data:image/png;base64,", "data:text/csv;charset=utf-8;base64,")), (
                tag,
                value[:60],
            )
        if name == "style":
            assert all(ref.startswith("#") for ref in re.findall(r"url\((.*?)\)", value)), value
    bare = [c for c in html if not c.isprintable() and c != "\n"]
    assert not bare
    assert found.tags.count("meta") == 4 and found.tags.count("style") == 1 and found.tags.count("title") == 1
    policy = [v for t, n, v in found.attributes if t == "meta" and n == "content"][0]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return found


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A sweep with a point for each payload, which stands in every text of the point, and in run.json."""
    workdir = tmp_path_factory.mktemp("hostile") / "<b>w\x1b[31m"
    points = []
    for i, payload in enumerate(PAYLOADS):
        columns = columns_of(
            payload, 512 * 2 ** (i % 3), model=PAYLOADS[i % 2], dtype=payload if i == 30 else "float32"
        )
        columns["schedule"] = payload
        row = ok_row(columns["length"], 0.1 + i / 60, i / 30)
        row |= {name: payload for name in FREE if name not in columns}
        row["segment_bytes"] = {payload: [1, 2]}
        row["tasks"] |= {payload: payload}
        if i % 7 == 3:
            row = {"status": "error", "message": payload}
        more = {"config": payload, "recipe": f"Recipe({payload})", "changes": {payload: payload}, "keep_ratio": payload}
        if i % 2:
            part = choice(payload, payload, payload, **{payload: payload})
            more["card"] = {"about": payload, "choices": [part], "paper": {payload: payload}}
        points.append((columns, row, more))
    # the store refuses lone surrogates, as SQLite does: JSON escapes them
    fill(workdir, points)
    many = {payload: payload for payload in PAYLOADS}
    names = ("flags", "git", "versions", "machine", "environment", "text", "models")
    run = {"started": PAYLOADS[0], "argv": PAYLOADS, **{name: many for name in names}}
    (workdir / "run.json").write_text(json.dumps({"runs": [run]}))
    return source.load(workdir)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A sweep with a point that failed, two seeds, and two points that have not run."""
    workdir = tmp_path_factory.mktemp("plain") / "w"
    sweep(workdir, change=failing, seeds=(0, 1))
    with sqlite3.connect(workdir / FILE) as db:
        db.execute("UPDATE points SET status = 'todo', row = NULL WHERE place >= 14")
    return source.load(workdir)


def test_there_are_60_payloads():
    assert len(set(PAYLOADS)) >= 60


def test_payloads_in_every_text_do_nothing_in_the_page(hostile):
    html = page(hostile)
    assert len(html.encode()) <= LARGEST
    found = check_harmless(html)
    for payload in PAYLOADS:
        assert visible(payload) in found.text, payload


def test_payloads_do_nothing_in_figures(hostile, tmp_path):
    rows = [r | {"model": "tiny", "dtype": "float32", "device": None} for r in hostile.rows]
    path = tmp_path / "a.svg"
    figures.save(figures.memory(rows), path)
    tags = {node.tag.rpartition("}")[2] for node in ElementTree.fromstring(path.read_bytes()).iter()}  # noqa: S314
    assert not tags & {"script", "foreignObject", "a", "image"}
    for payload in PAYLOADS:
        title = figures.facet_title((payload, payload, payload), [{"device": payload}])
        assert title.isprintable()
        assert plot_text(payload).replace(r"\$", "$") == visible(payload, 40)
        # no $ is left that would begin mathematics
        assert not re.search(r"(?<!\\)\$", plot_text(payload))


def test_payloads_do_nothing_in_a_csv(hostile):
    text = csv_text(hostile.rows)
    assert all(c.isprintable() or c == "\n" for c in text)
    lines = list(csv.reader(io.StringIO(text)))
    assert len(lines) == len(PAYLOADS) + 1 and lines[0][:2] == ["key", "status"]
    for line in lines[1:]:
        for name, cell in zip(lines[0], line, strict=True):
            if cell.lstrip().startswith(("=", "+", "-", "@", "＝")):
                assert BY_NAME.get(name) is None or BY_NAME[name].kind in ("int", "float")
                float(cell)


def test_csv_numbers_stay_numbers():
    assert (
        csv_cell(-0.5) == -0.5
        and csv_cell("-0.5") == "'-0.5"
        and csv_cell("\tx") == "'\\tx"
        and csv_cell("a-b") == "a-b"
    )
    assert csv_cell(None) is None


def test_a_report_needs_no_jax():
    code = "import sys, lcx.report.page, lcx.report.compare, lcx.report.export; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


def run(name, *args):
    """A command as a user runs it."""
    words = [sys.executable, "-m", f"experiments.{name}", *map(str, args)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_payloads_do_nothing_on_a_terminal(hostile, tmp_path):
    """Every cell differs, so that compare prints all names and notes."""
    other = tmp_path / "other"
    points = [(j.spec["columns"], {"status": "timeout", "message": "x"}, {"config": "y"}) for j in hostile.jobs]
    fill(other, points[:-1])
    done = run("compare", hostile.workdir, other)
    assert done.returncode == 1, done.stderr
    assert all(c.isprintable() or c == "\n" for c in done.stdout + done.stderr)
    assert "[red]rich[/red]" in done.stdout and "\\x1b[31mred" in done.stdout
    done = run("export", f"--workdir={hostile.workdir}", f"--out={tmp_path / 'a.csv'}")
    assert done.returncode == 0 and f"{len(PAYLOADS)} points" in done.stdout
    for words in ([tmp_path / "no\x1b[31m", other], ["--threshold=\x1b[31m", other, other]):
        done = run("compare", *words)
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "\x1b" not in run("compare", tmp_path / "no\x1b[31m", other).stderr


def test_page_says_what_was_measured_and_what_failed(plain):
    html = page(plain)
    found = check_harmless(html)
    for words in (
        "How it was measured",
        "predicted peak 9, limit 8",
        "oom_predicted",
        "cpu, 2 cores",
        "14 todo",
        "1 oom_predicted",
    ):
        assert words.replace("14 todo", "2 todo").replace("1 oom", "2 oom") in found.text or words in found.text, words
    # every column is explained
    assert all(c.meaning in html.replace("&gt;", ">").replace("&#x27;", "'") for c in BY_NAME.values())
    # one table for each order, and figures with their text as text
    assert all(f"{name}" in found.text for name in ORDERS)
    assert found.tags.count("svg") >= 5 and "time to first token" in found.text
    assert html == page(plain)


def test_page_has_its_rows_as_csv(plain):
    (link,) = (v for t, n, v in Reader(page(plain)).attributes if n == "href" and v.startswith("data:text/csv"))
    assert base64.b64decode(link.partition("base64,")[2]).decode() == csv_text(plain.rows)


def failed_points(count):
    """A source of points that failed with long messages."""
    columns = [columns_of(f"m{i}", model="tiny") for i in range(count)]
    points = [(Job(f"{i:x}", {"columns": c}), "error", ok_row(512, message="x" * 600)) for i, c in enumerate(columns)]
    rows, _ = source.whole_rows(points)
    return source.Source(Path("w"), [job for job, _, _ in points], rows, [])


def test_page_of_a_large_sweep_stays_within_its_size(monkeypatch):
    html = page(failed_points(2_500))
    assert (
        len(html.encode()) <= LARGEST
        and "The first 500 of 2,500 failures" in html
        and "<summary>all columns</summary>" not in html
    )
    monkeypatch.setattr("lcx.report.page.LARGEST", 10)
    html = page(failed_points(120))
    assert "The first 100 of 120 points" in html and "<summary>all columns</summary>" not in html


def test_orders_put_missing_values_last(plain):
    for names in ORDERS.values():
        values = [r[names[0]] for r in ordered(plain.rows, names)]
        there = [v for v in values if v is not None]
        assert there == sorted(there) and values[: len(there)] == there


def test_rows_are_those_of_read_rows(plain):
    assert plain.rows == read_rows(Store(plain.workdir, create=False))
    assert plain.odd == 0


def test_values_of_another_kind_are_left_out_and_counted(tmp_path):
    bad = {"ttft_s": "<b>", "cache_bytes": 2**70, "kl": True, "device": 5, "nll": [1]}
    fill(tmp_path / "w", [(columns_of(), ok_row(512) | bad, {}), (columns_of("int4"), ok_row(512), {})])
    found = source.load(tmp_path / "w")
    assert found.odd == 5 and all(found.rows[0][name] is None for name in bad)
    assert "5 values of the store" in page(found)


def test_figures_show_every_point(plain):
    rows = [r for r in plain.rows if r["seed"] == 0]
    fig = figures.memory(rows)
    (ax,) = fig.axes
    drawn = {tuple(line.get_xdata()) for line in ax.lines if line.get_marker() != "x"}
    assert drawn == {(512, 1_024), (512,)}
    (cross,) = (line for line in ax.lines if line.get_marker() == "x")
    assert list(cross.get_xdata()) == [1_024]
    assert any(t.get_text() == "h2o: oom_predicted" for t in ax.texts)


def test_figures_take_axes_of_the_caller(plain):
    fig = Figure()
    left, right = fig.subplots(1, 2)
    assert figures.latency(plain.rows, ax=(left, right)) is fig
    assert left.lines and right.lines
    assert figures.pareto(plain.rows, ax=left) is fig
    two = [*plain.rows, *(r | {"model": "other"} for r in plain.rows)]
    with pytest.raises(UserError, match="2 combinations"):
        figures.memory(two, ax=left)
    assert len(figures.memory(two).axes) == 2


def test_seeds_are_averaged_with_their_range(plain):
    (spot,) = (s for s in axes.curve(plain.rows, "int4", "kl") if s.length == 512)
    assert spot.low == pytest.approx(0.01) and spot.high == pytest.approx(0.011) and spot.mean == pytest.approx(0.0105)


@pytest.mark.parametrize("kind", ["none", "todo", "failed", "zero"])
def test_figures_draw_what_little_there_is(kind):
    none = {name: None for name in BY_NAME} | {"cache_over_dense": None, "nll_minus_dense": None} | columns_of()
    kinds = {
        "none": [],
        "todo": [none | {"status": "todo"}],
        "failed": [none | {"status": "killed"}],
        "zero": [none | ok_row(512) | {"length": 0}],
    }
    for fig in figures.every(kinds[kind]).values():
        assert figures.render(fig, "svg")


def test_files_of_figures_are_the_same_for_the_same_rows(plain, tmp_path):
    for name in ("a.svg", "b.svg", "a.png"):
        figures.save(figures.memory(plain.rows), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="allowed are names that end in"):
        figures.save(figures.memory(plain.rows), tmp_path / "a.gif")


def test_inline_svg_follows_the_page_and_keeps_ids_apart(plain):
    texts = [inline_svg(figures.memory(plain.rows), name, "a label") for name in ("one", "two")]
    ids = [set(re.findall(r' id="([^"]+)"', t)) for t in texts]
    assert ids[0] and not ids[0] & ids[1]
    assert (
        "currentColor" in texts[0]
        and axes.INK not in texts[0]
        and "<metadata" not in texts[0]
        and "http" not in texts[0]
    )


def test_front_is_what_nothing_beats():
    points = {"a": (1.0, 3.0), "b": (2.0, 1.0), "c": (2.5, 2.0), "d": (4.0, 0.5), "e": (4.0, 0.6), "f": (5.0, 0.5)}
    assert quality_panels.front_of(points) == ["a", "b", "d"]


@pytest.mark.parametrize(
    ("low", "high", "base"), [(3, 5, 2), (1e6, 1e12, 2), (0.03, 0.045, 10), (1e-9, 10, 10), (511, 513, 2)]
)
def test_ticks_are_few_and_within(low, high, base):
    found = axes.ticks(low, high, base)
    assert len(found) <= axes.MOST_TICKS and all(low <= t <= high for t in found)
    if high / low > 1.2:
        assert len(found) >= 2


def test_labels_do_not_cover_each_other():
    rows = [ok_row(512, 0.3 + i * 0.01, 0.1 + 0.01 * i) | columns_of(f"method_{i}") for i in range(8)]
    rows = [{name: None for name in BY_NAME} | r for r in [ok_row(512) | columns_of(), *rows]]
    (ax,) = figures.pareto([r | {"nll_minus_dense": None} for r in rows]).axes
    boxes = [t.get_window_extent() for t in ax.texts if t.get_text().startswith("method_")]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(ax.get_window_extent().x0 <= b.x0 and b.x1 <= ax.get_window_extent().x1 for b in boxes)


def test_needle_maps_put_points_together(plain):
    maps = heat.needle_maps(plain.rows)
    lengths, depths, scores = maps["h2o"]
    assert lengths == [512, 1_024] and depths == [0, 50, 100]
    assert math.isnan(scores[0][1]) and scores[2][0] == 50
    bad = [
        {
            "tasks": {"needle": {"lengths": [1], "depths": [2], "scores": "x"}},
            "method": "a",
            "model": "b",
            "dtype": "c",
            "batch": 1,
        }
    ]
    assert heat.needle_maps(bad) == {}


def test_scores_of_tasks_are_told_by_length(plain):
    rows = [dict(r) for r in plain.rows if (r["length"], r["seed"], bool(r["tasks"])) == (512, 0, True)]
    rows[0]["tasks"] = {
        "ruler": {"vt": 10.0, "mean": 30.0, "samples": 5},
        "ppl": 18.13,
        "longppl": {"message": "none is <key>"},
    }
    (table,) = scores.score_tables(rows)
    lines = dict(table.lines)
    assert table.title == "512 tokens" and len(table.methods) == len(rows)
    assert list(lines)[:3] == ["ruler mean", "ruler vt", "ppl"] and lines["ruler vt"] == [10.0] + [None] * (
        len(rows) - 1
    )
    assert lines["needle, mean of 3 depths"][1] > 50 and table.messages == [("dense", "longppl", "none is <key>")]
    page = "".join(tables.task_scores(rows))
    assert "none is &lt;key&gt;" in page and "18.130" in page and ">512 tokens</h3>" in page
    ((_, shown, messages),) = terminal.score_tables(rows)
    assert shown.row_count == len(lines) and messages == ["dense, longppl: none is <key>"]
    assert scores.score_tables([r | {"tasks": None} for r in rows]) == []
    junk = {"a": "x", "b": {"scores": [["x"]]}, "c": {"d": float("nan")}, "e": True, "f": [1]}
    assert scores.flat(junk) == scores.flat("x") == {}


def test_capacity_lines_are_those_of_the_gpus(plain):
    fig = figures.peak(plain.rows, capacity=("h200",))
    assert any("h200, 140" in t.get_text() for t in fig.axes[0].texts)
    with pytest.raises(UserError, match=r"capacity='h20': allowed are .*did you mean 'h200'"):
        figures.peak(plain.rows, capacity=("h20",))


def card_of(workdir, spec, row=None):
    """The card of a point with this spec."""
    points = [(Job("k", {"columns": columns_of("evil"), **spec}), "ok", row or ok_row(512))]
    rows, _ = source.whole_rows(points)
    (card,) = cards.cards(source.Source(workdir, [points[0][0]], rows, []))
    return card


def choice(axis, name, exact="", **settings):
    return {"axis": axis, "name": name, "settings": settings, "exact": exact}


def test_cards_read_specs_and_run_no_config(tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text('"""Another text."""\nopen("ran", "w").close()\n')
    monkeypatch.chdir(tmp_path)
    choices = [
        choice("codec", "Int", "Never: values are rounded.", bits="4"),
        choice("compress", "SnapKV", "While the prompt is within the budget.", budget="64"),
        choice("heads of near", "streaming"),
    ]
    stated = {"about": "Evil, arXiv:1.", "choices": choices, "paper": {"saving": 2.5}}
    card = card_of(tmp_path, {"config": "evil.py", "card": stated, "budget": 64, "changes": {"recipe.x": "3"}})
    assert not (tmp_path / "ran").exists()
    assert card.about == "Evil, arXiv:1." and card.paper == [("saving", 2.5)]
    assert card.settings == [("budget", "64"), ("config.recipe.x", "3")] and card.config == "evil.py"
    assert card.axes == [
        ("codec", "Int(bits=4)"),
        ("compress", "SnapKV(budget=64)"),
        ("heads of near", "streaming"),
        ("schedule", "OneShot()"),
    ]
    assert card.exact == ["Int: never: values are rounded.", "SnapKV: while the prompt is within the budget."]


def test_a_choice_that_differs_by_length_names_the_lengths(tmp_path):
    points = []
    for length, budget in ((512, "64"), (1_024, "128"), (2_048, "128")):
        spec = {"columns": columns_of("snapkv", length), "card": {"choices": [choice("compress", "SnapKV", b=budget)]}}
        points.append((Job(f"{length}", spec), "ok", ok_row(length)))
    rows, _ = source.whole_rows(points)
    (card,) = cards.cards(source.Source(tmp_path, [job for job, _, _ in points], rows, []))
    assert dict(card.axes)["compress"] == "SnapKV(b=64) at 512; SnapKV(b=128) at 1,024, 2,048"


@pytest.mark.parametrize("path", all_configs(), ids=lambda path: path.stem)
def test_cards_know_every_config_of_the_checkout(tmp_path, path):
    from lcx.experiment import Experiment
    from lcx.model_config import ModelConfig
    from lcx.sweep.points import Point, card_of_point

    experiment = load_config(path)
    if not isinstance(experiment, Experiment):
        return
    model = ModelConfig("tiny", 3, 48, 6, 2, 32, 40, 97, 512)
    # as a store gives it back
    spec = json.loads(json.dumps({"card": card_of_point(Point(path.stem, experiment, model.name, "", 512))}))
    card = card_of(tmp_path, spec)
    names = [text.partition("(")[0] for _, text in card.axes]
    chosen = {type(part).__name__ for _, _, part in experiment.recipe.parts()} - {"Causal", "KeepAll", "Exact"}
    assert chosen <= set(names) and len(names) > 1 and card.exact != ["not stated"]
    assert card.about and card.about in " ".join(path.read_text().split())
    assert card.paper == [(name, value) for name, value in experiment.paper.items()]


JUNK = [None, True, 0, -1.5, float("inf"), float("nan"), 10**40, "", "x", [], [[]], {}, {"": None}, {"a": {"b": []}}]
HOSTILE_SPECS = [
    *({"card": junk} for junk in JUNK),
    *({"card": {name: junk}} for name in ("choices", "about", "paper") for junk in (*JUNK, [1, None, "x"])),
    *({"card": {"choices": [{n: junk}]}} for n in ("axis", "name", "settings", "exact") for junk in (*JUNK, " ")),
    *({name: junk} for name in ("config", "changes", "budget", "keep_ratio", "recipe") for junk in JUNK),
    {"card": {"choices": [choice("codec", "Int")] * 2_000, "paper": {f"{i}": "x" * 600 for i in range(2_000)}}},
    {"card": {"about": "x" * 10**6, "choices": [choice("x" * 10**6, "y" * 10**6, "z" * 10**6, a="b" * 10**6)]}},
]


def source_of(workdir, specs):
    """A source with a method for each spec."""
    points = [
        (Job(f"k{i}", {"columns": columns_of(f"evil{i}"), **spec}), "ok", ok_row(512)) for i, spec in enumerate(specs)
    ]
    rows, _ = source.whole_rows(points)
    return source.Source(workdir, [job for job, _, _ in points], rows, [])


def test_hostile_specs_still_give_a_page(tmp_path, monkeypatch):
    # figures draw rows, not specs, and curves of so many methods take minutes
    monkeypatch.setattr("lcx.report.page._figures", lambda *_: el("section", id="figures"))
    half = len(HOSTILE_SPECS) // 2
    for specs in (HOSTILE_SPECS[:half], HOSTILE_SPECS[half:], HOSTILE_SPECS[-2:] * 60):
        html = page(source_of(tmp_path, specs))
        assert len(html.encode()) <= LARGEST
        found = check_harmless(html)
        # their lines in the tables and their cards
        assert all(found.words.count(f"evil{i}") >= 2 for i in range(min(len(specs), MOST_CARDS)))
        assert found.words.count("exact") >= found.attributes.count(("div", "class", "card")) > 0


def test_a_spec_without_a_card_shows_its_recipe_as_text(tmp_path):
    card = card_of(tmp_path, {"recipe": "Recipe(" + "(" * 10_000})
    assert card.axes[0] == ("recipe", "Recipe(" + "(" * 10_000) and card.exact == ["not stated"]


def compared(tmp_path, change, **options):
    """Comparison of two sweeps of which the second's rows are changed."""
    sweep(tmp_path / "a", lengths=(512,))
    sweep(tmp_path / "b", lengths=(512,), change=change)
    return compare(source.load(tmp_path / "a"), source.load(tmp_path / "b"), **options)


def only(method, **new):
    return lambda columns, row: row | new if columns["method"] == method else row


def slower(factor, spread=0.02, runs=5):
    def change(columns, row):
        if columns["method"] == "int4":
            decode = row["decode_s"] * factor
            ends = {"decode_p10_s": decode * (1 - spread), "decode_p90_s": decode * (1 + spread)}
            return row | {"decode_s": decode, "decode_n": runs} | ends
        return row

    return change


REGRESSIONS = {
    "slower": (slower(1.3), ["decode_s"]),
    "slower within the threshold": (slower(1.045, 0.001), []),
    "slower within the spread": (slower(1.3, 0.4), []),
    "too few runs to judge": (slower(3.0, 0.0, 2), []),
    "faster": (slower(0.5), []),
    "one byte more": (only("int4", cache_bytes=int(512 * 46_080 * 0.3) + 1), ["cache_bytes"]),
    "fewer bytes": (only("int4", cache_bytes=5), []),
    "worse": (only("int4", nll=3.2), ["nll"]),
    "worse within the tolerance": (only("int4", nll=3.11 + 5e-7), []),
    "failed": (only("int4", status="timeout"), ["status"]),
    "the same": (lambda columns, row: row, []),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_regressions(tmp_path, name):
    change, expected = REGRESSIONS[name]
    assert [c.name for _, c in compared(tmp_path, change).regressions] == expected


def test_point_that_has_not_run_is_a_regression(tmp_path):
    assert [
        c.name for _, c in compared(tmp_path, lambda c, row: None if c["method"] == "h2o" else row).regressions
    ] == ["status"]


def test_threshold_and_tolerance_are_options(tmp_path):
    assert not compared(tmp_path, slower(1.3), threshold=0.5).regressions


def test_times_of_another_machine_are_not_compared(tmp_path):
    found = compared(tmp_path, lambda columns, row: row | {"host": "other", "ttft_s": 99.0, "ttft_p10_s": 99.0})
    assert not found.regressions and "A ran on box (cpu, 2 cores), B on other (cpu, 2 cores)" in found.notes[0]


def test_cells_of_one_sweep_are_listed(tmp_path):
    sweep(tmp_path / "a", lengths=(512, 1_024))
    sweep(tmp_path / "b", lengths=(512, 2_048))
    a, b = source.load(tmp_path / "a"), source.load(tmp_path / "b")
    found = compare(a, b)
    assert {c[4] for c in found.only_before} == {1_024} and {c[4] for c in found.only_after} == {2_048}
    sweep(tmp_path / "c", model="other")
    with pytest.raises(UserError, match="share no cell"):
        compare(a, source.load(tmp_path / "c"))


def test_export_has_a_line_for_every_point(plain, tmp_path):
    out = tmp_path / "a.csv"
    export(plain.rows, out)
    lines = list(csv.DictReader(out.open()))
    assert [r["status"] for r in lines] == [r["status"] for r in plain.rows]
    assert {"ok", "oom_predicted", "todo"} == {r["status"] for r in lines}
    assert [float(r["nll_minus_dense"]) if r["nll_minus_dense"] else None for r in lines] == [
        r["nll_minus_dense"] for r in plain.rows
    ]


def test_export_without_pyarrow_names_the_extra(plain, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'lcx\[parquet\]'"):
        export(plain.rows, tmp_path / "a.parquet")


def test_parquet_holds_values_as_they_are(hostile, plain, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    for found in (hostile, plain):
        export(found.rows, tmp_path / "a.parquet")
        table = parquet.read_table(tmp_path / "a.parquet", page_checksum_verification=True).to_pylist()
        assert [r["key"] for r in table] == [r["key"] for r in found.rows]
        assert [r["cache_bytes"] for r in table] == [r["cache_bytes"] for r in found.rows]
    assert table[0]["kl"] == 0.0 and json.loads(table[0]["tasks"]) == plain.rows[0]["tasks"]


def test_salvage_writes_what_a_damaged_store_still_holds(tmp_path):
    workdir = tmp_path / "w"
    # values spread over many pages
    sweep(workdir, lengths=tuple(range(512, 2_560, 64)), change=lambda columns, row: row | {"message": "x" * 3_000})
    path = workdir / FILE
    whole = len(source.load(workdir).rows)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    content = bytearray(path.read_bytes())
    page_size = int.from_bytes(content[16:18], "big")
    middle = len(content) // page_size // 2 * page_size
    content[middle : middle + 4 * page_size] = b"\xff" * (4 * page_size)
    path.write_bytes(content)
    done = run("export", f"--workdir={workdir}", f"--out={tmp_path / 'a.csv'}")
    assert done.returncode == 2 and "--salvage" in done.stderr and len(done.stderr.splitlines()) == 1
    done = run("export", f"--workdir={workdir}", f"--out={tmp_path / 'a.csv'}", "--salvage")
    assert done.returncode == 0, done.stderr
    found = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert 0.5 * whole < len(found) < whole and all(r["status"] == "ok" and float(r["nll"]) >= 3.1 for r in found)


def test_report_command_writes_page_and_figures(plain):
    done = run("report", f"--workdir={plain.workdir}", "--formats=svg")
    assert done.returncode == 0, done.stderr
    check_harmless((plain.workdir / "report.html").read_text())
    names = {p.name for p in (plain.workdir / "figures").iterdir()}
    assert names == {"overview.svg", "memory.svg", "peak.svg", "latency.svg", "pareto.svg", "needle.svg"}


WRONG = [
    ("report",),
    ("report", "--workdir=nowhere"),
    ("report", "--workdir=W", "--formats=gif"),
    ("report", "--workdir=W", "--out=W/a.txt"),
    ("export", "--workdir=W"),
    ("export", "--workdir=W", "--out=a.txt"),
    ("export", "--workdir=W", "--out=nowhere/a.csv"),
    ("export", "--workdir=nowhere", "--out=W/a.csv", "--salvage"),
    ("compare", "W"),
    ("compare", "W", "W", "W"),
    ("compare", "W", "W", "--treshold=1"),
    ("compare", "W", "W", "--threshold=-1"),
]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_wrong_input_is_one_line_and_exit_code_2(plain, words):
    done = run(*(w.replace("W", str(plain.workdir)) for w in words))
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{words[0]}: ")


def test_files_are_written_whole_or_not_at_all(plain, tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    out.write_text("before")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"No space left on device; [\d,]+ bytes are needed"):
        write_report(plain, out)
    assert out.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["report.html"]
