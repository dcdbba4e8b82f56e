"""Facts of the structure: how long files are, which way imports go, what the core does not know, what is declared and not used."""

import ast
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("lcx", "pallas_kernels", "experiments", "configs")
MOST_LINES = 400
# what a method is written against and run by: it may know no method
CORE = [
    "axes", "cache", "checks", "ctx", "generate", "layer", "programs", "recipe", "segments", "session", "session_programs", "storage",
    "ops", "backends", "models",
]  # fmt: skip
# declared for the training of heads and gates, which comes with its own issue
AHEAD = {"optax", "orbax-checkpoint"}
IMPORTED_AS = {"absl-py": "absl", "orbax-checkpoint": "orbax"}


@cache
def files(*folders):
    tracked = subprocess.run(["git", "ls-files", *folders], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in tracked.stdout.split() if name.endswith(".py") and (ROOT / name).is_file()]


@cache
def tree(path):
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def module_of(path):
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules():
    return {module_of(p) for p in files(*PACKAGES)}


@cache
def imports(path, *, at_top=True):
    """Modules that a file imports: where it is loaded, or anywhere in it.  What is imported for types alone does not count."""
    known = modules()
    found = set()
    for node in _statements(tree(path)) if at_top else ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {
                f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in known else node.module for a in node.names
            }
    return found


def _statements(module):
    for node in module.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield from ast.walk(node) if isinstance(node, ast.Try | ast.If | ast.With) else [node]


def core_files():
    paths = files("lcx")
    return [p for p in paths if p.parts[1] in CORE or p.parts[1].removesuffix(".py") in CORE]


@pytest.mark.parametrize("path", files("lcx", "pallas_kernels", "experiments", "configs", "scripts"), ids=str)
def test_no_file_is_longer_than_one_can_read(path):
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_imports_have_no_circle():
    graph = {module_of(p): imports(p) for p in files(*PACKAGES)}
    done, way = set(), []

    def visit(module):
        if module in way:
            pytest.fail(" -> ".join([*way[way.index(module) :], module]))
        if module in done or module not in graph:
            return
        way.append(module)
        for other in sorted(graph[module]):
            visit(other)
        done.add(way.pop())

    for module in graph:
        visit(module)


def methods():
    """Names of the classes that a method is: those of the axes' folders."""
    names = set()
    for path in files("lcx/patterns", "lcx/policies", "lcx/codecs"):
        names |= {node.name for node in tree(path).body if isinstance(node, ast.ClassDef)}
    # the base of the policies that evict is no method
    return names - {"Evict"}


def test_the_core_names_no_method():
    pattern = re.compile(rf"\b({'|'.join(sorted(methods()))})\b")
    for path in core_files():
        code = ast.unparse(_without_docstrings(tree(path)))
        assert not pattern.findall(code), path


def _without_docstrings(module):
    module = ast.parse(ast.unparse(module))
    for node in ast.walk(module):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body[0] = ast.Pass()
    return module


PARTS = {"Part", "Pattern", "Policy", "Compress", "Codec", "Causal", "KeepAll", "Exact", "Evict"}


def test_nobody_asks_a_method_for_its_class():
    """`isinstance` on a method, or its functions compared by identity, would be a special case."""
    for path in files("lcx", "experiments"):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
                asked = set(re.findall(r"\w+", ast.unparse(node.args[1])))
                assert not asked & (PARTS | methods()), f"{path}:{node.lineno}"
            if isinstance(node, ast.Compare) and re.search(r"type\(\w+\)\.\w+ is ", ast.unparse(node)):
                pytest.fail(f"{path}:{node.lineno}: {ast.unparse(node)}")


def test_the_core_does_not_import_what_is_built_on_it():
    above = (
        "lcx.patterns",
        "lcx.policies",
        "lcx.codecs",
        "lcx.sweep",
        "lcx.plan",
        "lcx.report",
        "lcx.measure",
        "lcx.tasks",
        "experiments",
    )
    for path in core_files():
        assert not [m for m in imports(path, at_top=False) if m.startswith(above)], path


def test_a_sweep_does_not_import_its_report():
    for path in files("lcx/sweep"):
        assert not [m for m in imports(path, at_top=False) if m.startswith("lcx.report")], path


def test_commands_do_not_import_tests():
    for path in files("lcx", "pallas_kernels", "experiments"):
        assert not [m for m in imports(path, at_top=False) if m.split(".")[0] in ("tests", "conftest", "tiny")], path


def test_every_dependency_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[\[<>=; ]", text)[0] for text in project["dependencies"]}
    imported = {m.split(".")[0] for p in files(*PACKAGES) for m in imports(p, at_top=False)}
    unused = {name for name in declared if IMPORTED_AS.get(name, name).replace("-", "_") not in imported}
    assert unused == AHEAD


# ---- prose

# a docstring begins with an imperative and its object or with a noun, never with a preposition or a relative word
OPENINGS = ("What", "Whether", "Of", "As", "Where", "Which", "How", "Beside")
# words of an answer, not of a thing: a result is called by what it holds
VAGUE = ("found", "here", "told", "about", "shown", "said")


def prose_files():
    return files("lcx", "pallas_kernels", "experiments", "scripts", "configs")


def test_a_docstring_begins_with_an_imperative_or_a_noun():
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = [
        (str(path), getattr(node, "lineno", 1), (ast.get_docstring(node) or "_").split()[0].rstrip(",:;"))
        for path in prose_files()
        for node in ast.walk(tree(path))
        if isinstance(node, documented)
    ]
    assert [(path, line, word) for path, line, word in first if word in OPENINGS] == []


def test_a_variable_is_called_by_what_it_holds():
    """Parameters and fields are left out: callers may use their names."""
    vague = []
    for path in prose_files():
        nodes = list(ast.walk(tree(path)))
        bodies = [node.body for node in nodes if isinstance(node, ast.ClassDef)]
        fields = {id(s.target) for body in bodies for s in body if isinstance(s, ast.AnnAssign)}
        stored = [n for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and id(n) not in fields]
        vague += [(str(path), n.lineno, n.id) for n in stored if n.id in VAGUE]
    assert vague == []
