"""Wrong calls of every public entry, one a line: what is called, what the refusal says, and the same through the command."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
from pretrained_support import small_config

import lcx
from lcx.greedy import generate
from lcx.policies.h2o import H2O
from lcx.policies.snapkv import SnapKV
from lcx.schedules.chunked import Chunked
from lcx.schedules.lookup import Lookup
from lcx.sweep.settings import Settings

# fmt: off  (a line a case)
CONFIG = small_config("llama", tied=False)
VOCAB, CONTEXT = CONFIG.vocab_size, CONFIG.context
PROMPT, NEW = 12, 4
IDS = np.random.default_rng(0).integers(0, VOCAB - 1, PROMPT + NEW)
DENSE = lcx.Experiment(lcx.Recipe())
H2O6 = lcx.Recipe((lcx.Segment(policy=H2O(budget=6)),))
SNAP = lcx.Recipe((lcx.Segment(compress=SnapKV(budget=6, window=3)),))


@dataclass(frozen=True)
class Bad:
    """A wrong call.

    Attributes:
      entry: what is called.
      words: parts of the line: the key, its value, what is allowed.
      call: env -> the call.
      command: the same through a command, {path}, {text} and {folder} filled in; None: no command has it.
      said: parts of the command's line, where its flag has another name.
    """

    entry: str
    words: tuple[str, ...]
    call: Callable
    command: tuple[str, ...] | None = None
    said: tuple[str, ...] | None = None


def made(*words, recipe=None, prompt=PROMPT, **settings):
    recipe = lcx.Recipe() if recipe is None else recipe
    return Bad("Session", words, lambda e: lcx.Session(e.layers, recipe, prompt, **settings))


def method(name, *words, args=(), **settings):
    return Bad(f"Session.{name}", words, lambda e: getattr(e.session, name)(*args, **settings))


def peeked(*words, then):
    def call(e):
        session = lcx.Session(e.layers, lcx.Recipe(), PROMPT, NEW)
        session.pending = (SimpleNamespace(pos=np.zeros((1, 3), np.int32)), [])
        then(session)

    return Bad("Session after peek", words, call)


def text(*words, prompt=IDS[:PROMPT], num_tokens=NEW, command=None, said=None, session=None, **settings):
    make = session or (lambda e: lcx.Session(e.layers, lcx.Recipe(), PROMPT, NEW))
    return Bad("generate", words, lambda e: generate(make(e), prompt, num_tokens, **settings), command, said)


def scored(entry, *words, ids=IDS, experiment=DENSE, args=(), layers=None, command=None, said=None):
    call = lambda e: getattr(lcx, entry)(layers or e.layers, experiment, ids, *args)
    return Bad(entry, words, call, command, said)


def swept(*words, methods=None, lengths=(40,), command=None, said=None, **settings):
    methods = {"dense": lcx.Recipe()} if methods is None else methods
    settings = {"settings": Settings(continuation=8, repeats=1, decode_steps=1)} | settings
    return Bad("run_methods", words, lambda e: lcx.run_methods(e.model, methods, lengths, **settings), command, said)


GENERATE = ("generate", "--model={path}", "--prompt=ABC")
SCORE = ("score", "--model={path}", "--config=configs/dense.py", "--text_file={text}", "--out={folder}/out.npz")
SWEEP = ("sweep", "--model={path}", "--config=configs/dense.py", "--workdir={folder}/run", "--noreport")
CALIBRATE = ("calibrate", "--model={path}", "--out={folder}/split.json")
PLAN = ("plan", "--model={path}", "--device=cpu", "--lengths=64")

BAD = [
    made("recipe=", "Experiment", "allowed is a Recipe", recipe=DENSE),
    made("prompt=0", "integer of at least 1", prompt=0),
    made("prompt=True", "integer of at least 1", prompt=True),
    made("prompt=12.0", "integer of at least 1", prompt=12.0),
    made("new_tokens=-1", "at least 0", new_tokens=-1),
    made("batch=0", "at least 1", batch=0),
    made("order='both'", "attend, write", order="both"),
    made("order=3", "attend, write", order=3),
    made("schedule=512", "OneShot() and Chunked(size)", schedule=512),
    made("implementation='triton'", "xla, pallas, cudnn", implementation="triton"),
    made("aux=", "list of 2 dicts", aux={"heads": {}}),
    made("aux has 1 layers", "has 2", aux=[{}]),
    made("'weights'", "heads, arrays", aux=[{"weights": {}}, {}]),
    Bad("Session", ("model=", "Model or Layers"), lambda e: lcx.Session(e.path, lcx.Recipe(), 4)),
    method("prefill", f"token id {VOCAB} at row 1, place 2", f"0 to {VOCAB - 1}", args=([[1, 2, 3], [1, 2, VOCAB]],)),
    method("prefill", "token id -1 at row 0, place 0", args=([[-1], [1]],)),
    method("prefill", "tokens=", "allowed are integers", args=([[1.5], [2.0]],)),
    method("prefill", "tokens=None", "allowed are integers", args=(None,)),
    method("prefill", "rows of different lengths", "lengths", args=([[1, 2], [1]],)),
    method("prefill", "shape (3, 1)", "batch 2", args=([[1], [2], [3]],)),
    method("prefill", "shape (2, 0)", "at least one token", args=([[], []],)),
    method("prefill", "prompt of 13 tokens", "12", args=(np.ones((2, 13), int),)),
    method("prefill", "lengths=[0, 2]", "1 to 2", args=([[1, 2], [1, 2]], [0, 2])),
    method("prefill", "lengths=[3, 2]", "1 to 2", args=([[1, 2], [1, 2]], [3, 2])),
    method("prefill", "lengths have shape (1,)", "each of 2 rows", args=([[1, 2], [1, 2]], [2])),
    method("prefill", "rows='first'", "last, all", args=([[1], [2]],), rows="first"),
    method("step", f"token id {10**12}", f"0 to {VOCAB - 1}", args=([[1], [10**12]],)),
    method("step", "shape (1, 2)", "batch 2", args=([1, 2],)),
    method("step", "tokens=['a', 'b']", "integers", args=(["a", "b"],)),
    method("step", "tokens=[[True], [False]]", "integers", args=([[True], [False]],)),
    method("step", "a step of 5 tokens", "row 0 has 4 left", "more new_tokens", args=(np.ones((2, 5), int),)),
    method("step", "rows=None", "last, all", args=([[1], [2]],), rows=None),
    method("feed", "pos=11 of row 0 has been read", "from 12 on", args=([[1], [2]], [[11], [5]])),
    method("feed", "pos=[13, 12] of row 0", "rising", args=([[1, 2], [2, 3]], [[13, 12], [5, 6]])),
    method("feed", "pos=[5, 5] of row 1", "each once", args=([[1, 2], [2, 3]], [[12, 13], [5, 5]])),
    method("feed", "pos=-2", "-1 for padding", args=([[1], [2]], [[12], [-2]])),
    method("feed", f"pos={2**30}", "positions from 0 to", args=([[1], [2]], [[2**30], [5]])),
    method("feed", "pos have shape (2,)", "(2, 1)", args=([[1], [2]], [12, 5])),
    method("feed", "pos=", "integers", args=([[1], [2]], [[12.0], [5.0]])),
    method("feed", "phase='train'", "prefill, decode", args=([[1], [2]], [[12], [5]]), phase="train"),
    method("feed", "left=[-1, 0]", "at least 0", args=([[1], [2]], [[12], [5]]), left=[-1, 0]),
    method("feed", "left=[0]", "each of 2 rows", args=([[1], [2]], [[12], [5]]), left=[0]),
    Bad(
        "Session.feed",
        ("phase='decode' before any prompt", "call prefill first"),
        lambda e: lcx.Session(e.layers, SNAP, PROMPT, NEW).step([1]),
    ),
    Bad(
        "Session.feed",
        ("phase='prefill' by feed", "call prefill"),
        lambda e: lcx.Session(e.layers, SNAP, PROMPT, NEW).feed([1], [0], phase="prefill"),
    ),
    method("peek", f"token id {VOCAB}", f"0 to {VOCAB - 1}", args=([[VOCAB], [0]],)),
    method("peek", "a step of 5 tokens", "row 0 has 4 left", args=(np.ones((2, 5), int),)),
    method("peek", "pos=4 of row 1 has been read", "from 5 on", args=([[1], [2]], [[12], [4]])),
    method("peek", "shape (1, 1)", "batch 2", args=([1],)),
    Bad(
        "Session.peek",
        ("order='write'", "order='attend'"),
        lambda e: lcx.Session(e.layers, lcx.Recipe(), PROMPT, NEW, order="write").peek([1]),
    ),
    Bad(
        "Session.peek",
        ("as_stored=True", "H2O", "as_stored=False"),
        lambda e: lcx.Session(e.layers, H2O6, PROMPT, NEW).peek([1], as_stored=True),
    ),
    method("compile", "prefill=0", "at least 1", args=(0,)),
    method("compile", "steps=0", "at least 1", args=(4, [0])),
    method("compile", "steps=1", "allowed is a list", args=(4, 1)),
    method("commit", "nothing is pending", "call peek first", args=([1, 1],)),
    peeked("accept=[4]", "0 to 3 tokens", then=lambda s: s.commit([4])),
    peeked("accept=[-1]", "at least 0", then=lambda s: s.commit([-1])),
    peeked("accept=[1, 1]", "each of 1 rows", then=lambda s: s.commit([1, 1])),
    peeked("accept has shape (2,)", "(1, 3)", then=lambda s: s.commit([True, False])),
    peeked("accept=[1.5]", "integers", then=lambda s: s.commit([1.5])),
    peeked("peeked step waits", "commit", then=lambda s: s.step([1])),
    peeked("peeked step waits", "commit", then=lambda s: s.peek([1])),
    peeked("peeked step waits", "commit", then=lambda s: s.forget(0)),
    method("forget", "first=-1", "at least 0", args=(-1,)),
    method("forget", "first=20", "at most 12", args=(20,)),
    method("forget", "last=2", "at least 3", args=(3, 2)),
    method("forget", "first=1.0", "integer", args=(1.0,)),
    method("forget", "rows=2", "at most 1", args=(3, 4, [2])),
    method("forget", "rows=1 is a int", "allowed is a list", args=(3, 4, 1)),
    text("prompt of 13 tokens", "12", prompt=np.ones(13, int)),
    text(f"token id {VOCAB}", f"0 to {VOCAB - 1}", prompt=[1, VOCAB]),
    text(
        "tokens=[]",
        "at least one token",
        prompt=[],
        command=("generate", "--model={path}", "--prompt="),
        said=("prompt=''",),
    ),
    text("tokens='ABC'", "integers", prompt="ABC"),
    text("shape (2, 1)", "batch 1", prompt=[[1], [2]]),
    text("num_tokens=0", "at least 1", num_tokens=0, command=(*GENERATE, "--num_tokens=0"), said=("num_tokens=0",)),
    text(
        "num_tokens=2.0", "integer", num_tokens=2.0, command=(*GENERATE, "--num_tokens=2.0"), said=("num_tokens=2.0",)
    ),
    text(
        "num_tokens=6",
        "new_tokens of at least 5",
        num_tokens=6,
        command=(*GENERATE, "--num_tokens=999"),
        said=("length=1001", f"{CONTEXT}"),
    ),
    text(f"token id {VOCAB}", "0 to", stop=[VOCAB]),
    text("stop=5", "allowed is a list", stop=5),
    text("session=", "allowed is a Session", session=lambda e: e.model),
    text("batch 2", "allowed is 1", session=lambda e: e.session),
    text(
        "order='write'",
        "order='attend'",
        draft=Lookup(),
        session=lambda e: lcx.Session(e.layers, lcx.Recipe(), PROMPT, NEW, order="write"),
    ),
    Bad(
        "Lookup",
        ("num_tokens=0", "at least 1"),
        lambda e: Lookup(num_tokens=0),
        (*GENERATE, "--draft_tokens=0"),
        ("draft_tokens=0",),
    ),
    Bad("Chunked", ("size=0", "at least 1"), lambda e: Chunked(0), (*GENERATE, "--chunk_size=0"), ("chunk_size=0",)),
    Bad(
        "Experiment.with_budget",
        ("keep_ratio=nan", "above 0 and at most 1"),
        lambda e: lcx.Experiment(SNAP).with_budget(100, None, math.nan),
        (*GENERATE, "--config=configs/tova.py", "--keep_ratio=nan"),
    ),
    Bad(
        "Experiment.with_budget",
        ("budget=0",),
        lambda e: lcx.Experiment(SNAP).with_budget(2, None, 0.1),
        (*GENERATE, "--config=configs/tova.py", "--keep_ratio=0.1"),
        ("budget=0", "at least 1"),
    ),
    scored(
        "score_text", "num_tokens=1", "at least 2", ids=[1], command=(*SCORE, "--num_tokens=1"), said=("num_tokens=1",)
    ),
    scored("score_text", "tokens=[]", "at least one", ids=[]),
    scored("score_text", f"token id {VOCAB}", "0 to", ids=[1, VOCAB, 2]),
    scored("score_text", "tokens=[1.7, 2.2]", "integers", ids=[1.7, 2.2]),
    scored("score_text", "ids=[[1, 2, 3]]", "one text", ids=[[1, 2, 3]]),
    scored("score_text", "experiment is a Recipe", "lcx.Experiment(recipe)", experiment=lcx.Recipe()),
    scored("score_text", "layers=", "allowed is a Layers", layers="smollm2-135m"),
    scored(
        "score_continuation",
        "prompt=0",
        "at least 1",
        args=(0,),
        command=(*SCORE, "--prompt_tokens=0"),
        said=("prompt_tokens=0",),
    ),
    scored(
        "score_continuation",
        "prompt_tokens=15 and continuation_tokens=0",
        "at least 1",
        args=(15,),
        command=(*SCORE, "--prompt_tokens=80", "--continuation_tokens=30"),
        said=("has", "tokens, 111 are needed"),
    ),
    scored("score_continuation", "prompt='12'", "integer", args=("12",)),
    scored("score_continuation", "prompt=True", "integer", args=(True,)),
    scored("score_continuation", f"token id {VOCAB}", "0 to", ids=[*IDS, VOCAB], args=(4,)),
    scored("score_continuation", "tokens=", "integers", ids=IDS.astype(float), args=(4,)),
    swept(
        "lengths: 8", "above the continuation of 8", lengths=[8], command=(*SWEEP, "--lengths=100"), said=("100", "256")
    ),
    swept(
        "lengths=[]", "at least one", lengths=[], command=(*SWEEP, "--lengths="), said=("lengths=''", "whole numbers")
    ),
    swept(
        "lengths=[40, 40]",
        "each once",
        lengths=[40, 40],
        command=(*SWEEP, "--lengths=300,300"),
        said=("300", "each once"),
    ),
    swept(
        "lengths=40.0",
        "integer",
        lengths=[40.0],
        command=(*SWEEP, "--lengths=4²"),
        said=("lengths='4²'", "whole numbers"),
    ),
    swept("lengths=40 is a int", "allowed is a list", lengths=40),
    swept(
        f"length={CONTEXT + 1}",
        f"{CONTEXT}",
        lengths=[CONTEXT + 1],
        command=(*SWEEP, "--lengths=300"),
        said=("300", f"{CONTEXT}"),
    ),
    swept("methods={}", "at least one", methods={}),
    swept("methods=", "Mapping", methods=[lcx.Recipe()]),
    swept("methods['dense']", "Experiment or Recipe", methods={"dense": "configs/dense.py"}),
    swept("batch=0", "at least 1", batch=0, command=(*SWEEP, "--batch=0"), said=("batch='0'", "at least 1")),
    swept("settings=", "allowed is a Settings", settings={"repeats": 1}),
    swept(
        "keep_ratio=1.5",
        "above 0 and at most 1",
        methods={"dense": lcx.Recipe(), "snapkv": SNAP},
        keep_ratio=1.5,
        command=(*SWEEP, "--config=configs/tova.py", "--keep_ratio=1.5", "--lengths=300", "--allow_extrapolation"),
    ),
    Bad(
        "Settings", ("repeats=0", "at least 1"), lambda e: Settings(repeats=0), (*SWEEP, "--repeats=0"), ("repeats=0",)
    ),
    Bad("Settings", ("continuation=1.5", "integer"), lambda e: Settings(continuation=1.5)),
    Bad("Settings", ("tasks='niah'", "ppl"), lambda e: Settings(tasks=("niah",)), (*SWEEP, "--tasks=niah")),
    Bad(
        "load",
        ("model='smollm'", "allowed are smollm2-135m"),
        lambda e: lcx.load("smollm"),
        ("generate", "--prompt=a", "--model=smollm"),
    ),
    Bad(
        "load",
        ("/nothing.gguf'", "no such file"),
        lambda e: lcx.load("/nothing.gguf"),
        ("generate", "--prompt=a", "--model=/nothing.gguf"),
    ),
    Bad("load", ("model=''",), lambda e: lcx.load(""), ("generate", "--prompt=a", "--model=")),
    Bad("load", ("model=None", "allowed is a str"), lambda e: lcx.load(None)),
    Bad(
        "load",
        ("dtype='float64'", "float32, bfloat16"),
        lambda e: lcx.load(e.path, "float64"),
        (*GENERATE, "--dtype=float64"),
        ("dtype=float64",),
    ),
    Bad(
        "load_config",
        ("config='configs/no.py'", "no such config"),
        lambda e: lcx.load_config("configs/no.py"),
        (*GENERATE, "--config=configs/no.py"),
    ),
    # what only a command takes
    *(
        Bad("command", words, None, command)
        for words, command in [
            (("prompt_tokens=9", "the prompt has 3 tokens"), (*GENERATE, "--prompt_tokens=9")),
            (("U+006F",), ("generate", "--model={path}", "--prompt=o")),
            (("draft=guess", "lookup"), (*GENERATE, "--draft=guess")),
            (("draft_tokens=4", "--draft=lookup"), (*GENERATE, "--draft_tokens=4")),
            (("draft_ngram=0",), (*GENERATE, "--draft=lookup", "--draft_ngram=0")),
            (("text_file=", "cannot be read"), ("generate", "--model={path}", "--prompt_file={folder}")),
            (("out=", "is a folder"), (*SCORE[:-1], "--out={folder}/taken.npz")),
            (("out='a.txt'", ".npz"), (*SCORE[:-1], "--out=a.txt")),
            (
                ("num_tokens=5 and prompt_tokens=5", "one of them"),
                (*SCORE, "--num_tokens=5", "--prompt_tokens=5", "--continuation_tokens=2"),
            ),
            (("has", "tokens, 999 are needed"), (*SCORE, "--num_tokens=999")),
            (("tokens=0", "at least 1"), (*CALIBRATE, "--tokens=0")),
            (("tokens=1100", f"1 to {CONTEXT // 2}"), CALIBRATE),
            (("start=-1", "at least 0"), (*CALIBRATE, "--tokens=20", "--start=-1")),
            (("copies=0", "at least 1"), (*CALIBRATE, "--tokens=20", "--copies=0")),
            (("window=0", "at least 1"), (*CALIBRATE, "--tokens=20", "--window=0")),
            (("tokens=20", "above sink + window = 320"), (*CALIBRATE, "--tokens=20")),
            (("text='emma'", "pride_and_prejudice"), (*CALIBRATE, "--text=emma")),
            (("out=''", "--out="), ("calibrate", "--model={path}")),
            (("out=", "is a folder"), ("calibrate", "--model={path}", "--out={folder}")),
            (("lengths: 0", "must be from 1"), (*PLAN, "--lengths=0")),
            (("lengths='²'", "tokens with commas"), (*PLAN, "--lengths=²")),
            (("lengths=64,64", "each once"), (*PLAN, "--lengths=64,64")),
            (("device='h201'", "cpu, h200"), (*PLAN, "--device=h201")),
            (
                ("budget=5 and keep_ratio=0.5", "one of them"),
                (*PLAN, "--config=configs/tova.py", "--budget=5", "--keep_ratio=0.5"),
            ),
            (("out='a.csv'", ".json"), (*PLAN, "--out=a.csv")),
            (("batch=0",), (*PLAN, "--batch=0")),
            (("implementation='triton'", "xla, pallas"), (*PLAN, "--implementation=triton")),
            (("memory_limit='².5GiB'", "16GiB"), (*SWEEP, "--memory_limit=².5GiB")),
            (("seed='-1'", "at least 0"), (*SWEEP, "--seed=-1")),
        ]
    ),
]
