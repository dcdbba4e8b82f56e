"""Which choices of a recipe go together: chains that hold keys before RoPE, pairs that are refused, aux that does not fit."""

from dataclasses import dataclass, replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ATOL, TINY, layers, quick_compilation, text  # noqa: F401, the fixture is for every test

from lcx.artefacts.head_mass import FarMass
from lcx.artefacts.head_split import split_by_score
from lcx.axes import Array, KeepAll, RawExact
from lcx.codecs import kivi, paged
from lcx.codecs.exact import Cast
from lcx.codecs.kivi import Kivi
from lcx.codecs.paged import Paged
from lcx.errors import UserError
from lcx.patterns.minference import MInference
from lcx.patterns.quest import Quest
from lcx.patterns.streaming import CachePositions
from lcx.policies.duo import duo
from lcx.policies.flush import Flush
from lcx.policies.h2o import H2O
from lcx.policies.sink_window import SinkWindow
from lcx.policies.snapkv import SnapKV
from lcx.policies.tova import TOVA
from lcx.recipe import Recipe, Segment
from lcx.schedules.chunked import Chunked
from lcx.session import Session

PROMPT, NEW = 22, 5


@dataclass(frozen=True)
class RawCast(Cast):
    """Keys before RoPE and values in a narrower type."""

    raw = True


def play(recipe, chunk=9):
    """Logits after the prompt and after each of NEW tokens, and the session."""
    tokens = text(PROMPT + NEW, 1)
    session = Session(layers(), recipe, PROMPT, NEW, schedule=Chunked(chunk))
    logits = [session.prefill(tokens[:PROMPT])] + [session.step([t]) for t in tokens[PROMPT:]]
    return np.concatenate(logits), session


def refusal(make):
    with pytest.raises(UserError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- keys before RoPE in a chain


@pytest.mark.parametrize(("page", "keep"), [(4, 5), (1, 0)])
def test_a_chain_with_raw_keys_equals_its_codec_alone(page, keep):
    """Every link holds raw keys then, and each key is rotated once, when it is read."""
    got, session = play(Recipe(((Segment("tail", policy=Flush(page, keep)), Segment("rest", codec=RawExact())),)))
    alone, single = play(Recipe((Segment(codec=RawExact()),)))
    np.testing.assert_allclose(got, alone, atol=2e-5)  # f32, the same keys in another order
    np.testing.assert_allclose(got, play(Recipe())[0], atol=2e-5)
    for chained, held in zip(session.cache, single.cache, strict=True):
        keys = [
            np.asarray(chained[name].payload["k"])[..., : np.sum(chained[name].pos >= 0)] for name in ("rest", "tail")
        ]
        np.testing.assert_allclose(np.concatenate(keys, -1), held["all"].payload["k"], atol=ATOL)


def test_a_chain_whose_tail_hands_down_everything_equals_a_lossy_raw_codec_alone():
    codec = RawCast("float8_e4m3")
    got, _ = play(Recipe(((Segment("tail", policy=Flush(1, 0)), Segment("rest", codec=codec)),)))
    alone, _ = play(Recipe((Segment(codec=codec),)))
    np.testing.assert_allclose(got, alone, atol=2e-5)
    assert np.abs(got - play(Recipe())[0]).max() > 1e-2


def test_a_cut_at_the_end_of_the_prompt_hands_raw_keys_down():
    cut = SnapKV(10, window=3)
    tail = Segment("tail", policy=Flush(4, 5), compress=cut)
    got, _ = play(Recipe(((tail, Segment("rest", codec=RawExact())),)))
    alone, _ = play(Recipe((Segment(compress=cut),)))
    np.testing.assert_allclose(got, alone, atol=2e-5)
    assert np.abs(got - play(Recipe())[0])[1:].max() > 1e-2


# ---- pairs that are refused

EVERY, ORDER, ATTENTION = (
    "every KV head of the layer",
    "slots that are filled in the order",
    "the attention over every key",
)
ONE = partial(Segment, "one", heads="one")


def one(policy=None, codec=None, compress=None, pattern=None, **settings):
    """A recipe of one segment."""
    given = {"policy": policy, "codec": codec, "compress": compress}
    segment = Segment(**{n: part for n, part in given.items() if part is not None}, **settings)
    return Recipe((segment,)) if pattern is None else Recipe((segment,), pattern)


# every rule that Recipe ever had: what makes it, and words of the sentence that names the cause
REFUSED = {
    "nothing": (lambda: Recipe(()), "segments=() holds nothing"),
    "names": (lambda: Recipe((ONE(), ONE())), "segment names ['one', 'one'] repeat"),
    "heads in a chain": (
        lambda: Recipe(((Segment("tail", policy=Flush(4)), Segment("rest", heads="one")),)),
        "chain ['tail', 'rest'] joins heads ['all', 'one']",
    ),
    "cache positions, chain": (
        lambda: Recipe((kivi.chain(2, 8, 8),), CachePositions()),
        "CachePositions needs a chain of one segment, which chain ['tail', 'recent', 'pages'] does not leave",
    ),
    "compress below": (
        lambda: Recipe(((Segment("tail", policy=Flush(4)), Segment("rest", compress=SnapKV())),)),
        "compress of segment 'rest': only the first segment of a chain can have one",
    ),
    "compress, h2o": (lambda: one(H2O(), compress=SnapKV()), f"H2O needs {ATTENTION}", "SnapKV does not leave"),
    "compress, tova": (
        lambda: one(TOVA(), compress=SnapKV()),
        "TOVA needs one set of positions",
        "SnapKV does not leave",
    ),
    "compress, h2o below": (
        lambda: Recipe(((Segment("tail", policy=Flush(4), compress=SnapKV()), Segment("rest", policy=H2O())),)),
        f"H2O needs {ATTENTION}",
        "SnapKV does not leave",
    ),
    "compress, mass": (lambda: one(FarMass(2, 5), compress=SnapKV()), f"FarMass needs {ATTENTION}", "SnapKV"),
    "tova, heads": (lambda: one(TOVA(), heads="one"), f"TOVA needs {EVERY}", "heads='one' does not leave"),
    "kivi, sink_window": (
        lambda: Recipe(((Segment("tail", policy=Flush(32)), Segment("rest", policy=SinkWindow(), codec=Kivi())),)),
        f"Kivi needs {ORDER}",
        "SinkWindow does not leave",
    ),
    "paged, h2o": (
        lambda: Recipe(((Segment("tail", policy=Flush(64)), Segment("rest", policy=H2O(), codec=Paged())),)),
        f"Paged needs {ORDER}",
        "H2O does not leave",
    ),
    "kivi first": (lambda: one(codec=Kivi()), "Kivi encodes pages of 32 tokens; put a segment before it in its chain"),
    "paged first": (lambda: one(codec=Paged()), "Paged encodes pages of 64 tokens; put a segment before it"),
    "quest, flush": (
        lambda: Recipe(((Segment("tail", policy=Flush(4)), Segment("rest")),), Quest()),
        f"Quest needs {ORDER}",
        "Flush does not leave",
    ),
    "quest, kivi": (lambda: Recipe((kivi.chain(),), Quest()), "Quest needs", "does not leave"),
    "quest, paged": (lambda: Recipe((paged.chain(),), Quest()), "Quest needs", "does not leave"),
    "quest, sink_window": (lambda: one(SinkWindow(), pattern=Quest()), f"Quest needs {ORDER}", "SinkWindow"),
    "quest, tova": (lambda: one(TOVA(), pattern=Quest()), "needs", "does not leave", "TOVA", "Quest"),
    "quest, h2o": (lambda: one(H2O(), pattern=Quest()), "needs", "does not leave", "H2O", "Quest"),
    "quest, mass": (lambda: one(FarMass(2, 5), pattern=Quest()), f"FarMass needs {ATTENTION}", "Quest does not leave"),
    "minference, h2o": (lambda: one(H2O(), pattern=MInference()), f"H2O needs {ATTENTION}", "MInference"),
    "minference, mass": (lambda: one(FarMass(2, 5), pattern=MInference()), f"FarMass needs {ATTENTION}", "MInference"),
    # new: a page that is handed down whole, what TOVA reads, and a second chain for all heads
    "minference, tova": (lambda: one(TOVA(), pattern=MInference()), "TOVA needs the attention of a step", "MInference"),
    "pages of another size": (
        lambda: Recipe(((Segment("tail", policy=Flush(48, 64)), Segment("rest", codec=Kivi())),)),
        "Kivi encodes pages of 32 tokens",
        "hands down whole pages",
    ),
    "smaller pages": (
        lambda: Recipe(((Segment("tail", policy=Flush(4)), Segment("rest", codec=Kivi())),)),
        "Kivi encodes pages of 32 tokens",
        "hands down whole pages",
    ),
    "two chains of all": (
        lambda: Recipe((Segment("a"), Segment("b"))),
        "segments ['a'] hold heads='all', and there are 2 chains; give every chain heads of its own by name",
    ),
    "all beside some": (
        lambda: Recipe((ONE(), (Segment("tail", policy=Flush(4)), Segment("rest")))),
        "segments ['tail', 'rest'] hold heads='all', and there are 2 chains",
    ),
    "rounding": (lambda: Recipe(rounding=0), "rounding=0 must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_pair_that_does_not_go_together_is_refused_by_name_and_cause(name):
    make, *words = REFUSED[name]
    message = refusal(make)
    for word in words:
        assert word in message, message


def test_pairs_that_go_together_are_built():
    """The same parts beside others: the refusals above are of pairs."""
    one(SinkWindow(), compress=SnapKV())
    one(H2O(), pattern=CachePositions())
    one(TOVA())
    one(compress=SnapKV(), pattern=Quest())
    one(compress=SnapKV(), pattern=MInference())
    one(SinkWindow(), pattern=MInference())
    one(H2O(), heads="one")
    Recipe((kivi.chain(compress=SnapKV()),))
    Recipe((paged.chain(heads="some"), Segment("rest", heads="rest", policy=SinkWindow())))
    Recipe(duo(2, 5))


# ---- aux

SPLIT = split_by_score([[0, 1]] * TINY.num_layers, 0.5)
SIZES = [{"arrays": {"vertical": np.full(TINY.num_heads, 30)}} for _ in range(TINY.num_layers)]


def changed(aux, layer, **entries):
    return [here | entries if i == layer else here for i, here in enumerate(aux)]


def sizes(array):
    return changed(SIZES, 1, arrays={"vertical": array})


@dataclass(frozen=True)
class Learnt(KeepAll):
    """Keeps every token; wants arrays of each kind."""

    def arrays(self, model):
        return {"gate": Array((3,), per="KV head"), "table": Array((2, 4))}


LEARNT = [{"arrays": {"gate": np.ones((2, 3)), "table": np.ones((2, 4), np.float32)}} for _ in range(TINY.num_layers)]
MINFERENCE, DUO, LEARNED = Recipe(pattern=MInference()), Recipe(duo(2, 5)), one(Learnt())


@pytest.mark.parametrize(
    ("recipe", "aux", "problem"),
    [
        (DUO, changed(SPLIT, 2, per_head={}), "aux of layer 2: key 'per_head' is not read; allowed are heads, arrays"),
        (Recipe(), changed(SPLIT, 0, window=3), "aux of layer 0: key 'window' is not read"),
        (DUO, SPLIT[:2], "aux has 2 layers, model 'tiny' has 3"),
        (DUO, None, "aux names no heads ['retrieval', 'streaming'] in layer 0"),
        (DUO, changed(SPLIT, 1, heads={"retrieval": [0, 1]}), "aux names no heads ['streaming'] in layer 1"),
        (DUO, changed(SPLIT, 1, heads={"retrieval": [0], "streaming": []}), "heads of layer 1 are [0]; each of 0..1"),
        (DUO, changed(SPLIT, 1, heads={"retrieval": [0, 1], "streaming": [1]}), "heads of layer 1 are [0, 1, 1]"),
        (
            MINFERENCE,
            changed(SIZES, 1, arrays={"slahs": np.full(6, 50)}),
            "aux array 'slahs' of layer 1 is read by no part",
        ),
        (MINFERENCE, changed(SIZES, 1, arrays={"slahs": np.full(6, 50)}), "did you mean 'slash'?"),
        (Recipe(), SIZES, "aux array 'vertical' of layer 0 is read by no part of the recipe ; allowed are none"),
        (
            MINFERENCE,
            sizes(np.full(2, 30)),
            "aux array 'vertical' of layer 1 is int32 (2,); allowed is int32 (6,) per query head",
        ),
        (MINFERENCE, sizes(np.full((2, 3), 30)), "(2, 3); allowed is int32 (6,) per query head"),
        (MINFERENCE, sizes(np.full(6, 30.0)), "allowed is int32 (6,) per query head"),
        (MINFERENCE, sizes(30), "(); allowed is int32 (6,) per query head"),
        (LEARNED, None, "aux has no array 'gate' in layer 0, (2, 3) per KV head"),
        (
            LEARNED,
            changed(LEARNT, 2, arrays={"gate": np.ones((2, 3))}),
            "aux has no array 'table' in layer 2, (2, 4) per layer",
        ),
        (
            LEARNED,
            changed(LEARNT, 2, arrays=LEARNT[0]["arrays"] | {"gate": np.ones((6, 3))}),
            "allowed is float32 (2, 3) per KV head",
        ),
        (
            LEARNED,
            changed(LEARNT, 2, arrays=LEARNT[0]["arrays"] | {"table": np.ones((2, 4), int)}),
            "allowed is float32 (2, 4) per layer",
        ),
    ],
)
def test_aux_that_does_not_fit_is_refused_in_one_line(recipe, aux, problem):
    assert problem in refusal(lambda: recipe.check(TINY, aux))
    assert problem in refusal(lambda: Session(layers(), recipe, PROMPT, aux=aux))


def test_aux_that_fits_is_taken():
    for recipe, aux in ((DUO, SPLIT), (MINFERENCE, SIZES), (MINFERENCE, None), (LEARNED, LEARNT), (Recipe(), None)):
        recipe.check(TINY, aux)
    with_both = [a | b for a, b in zip(SPLIT, SIZES, strict=True)]
    replace(DUO, pattern=MInference()).check(TINY, with_both)
    assert Session(layers(), MINFERENCE, PROMPT, aux=SIZES).aux[1]["arrays"]["vertical"].dtype == jnp.int32
