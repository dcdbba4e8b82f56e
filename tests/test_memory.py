"""Scratch memory of the compiled steps at the shapes of Llama-3-8B and 131,072 tokens: nothing is allocated, nothing runs.

One block and the logits of the last token are the programs of a step.  The cache is donated: a program that copied it would need
0.5 GiB more a layer in bfloat16.
"""

from functools import cache

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lcx.artefacts.head_split import split_by_score
from lcx.backends.choose import AUTO, resolve
from lcx.backends.pallas import LISTED_ROWS
from lcx.cache import shape_bytes
from lcx.codecs.exact import Cast
from lcx.codecs.int_token import Int
from lcx.codecs.kivi import chain
from lcx.codecs.paged import chain as paged_chain
from lcx.errors import UserError
from lcx.model_config import ModelConfig, Rope, param_shapes
from lcx.models.decoder import Block, Layers, logits_program
from lcx.patterns.minference import MInference
from lcx.patterns.quest import Quest
from lcx.patterns.xattention import XAttention
from lcx.plan.targets import TARGETS, compile_device, compile_for, gpu_target
from lcx.policies.duo import duo
from lcx.policies.h2o import H2O
from lcx.policies.sink_window import SinkWindow
from lcx.programs import block_program
from lcx.recipe import Recipe, Segment
from lcx.session import Session
from lcx.storage import Shape

# three of the 32 layers: Quest reads the first two densely
LLAMA3_8B = ModelConfig("llama3-8b", 3, 4_096, 32, 8, 128, 14_336, 128_256, 131_072, rope=Rope(base=5e5), tied=False)
TOKENS, CHUNK = 131_072, 2_048
GIB = 2**30
HALF = split_by_score([[0, 1] * 4] * 3, 0.5)


def recipes(exact):
    """`exact`: codec of the segments that are not quantised, None for the model's own type."""
    plain = {} if exact is None else {"codec": exact}
    return {
        "dense": Recipe((Segment(**plain),)),
        "int8": Recipe((Segment(codec=Int(8)),)),
        "int4": Recipe((Segment(codec=Int(4)),)),
        "kivi2": Recipe((chain(2),)),
        "int4_pages": Recipe((paged_chain("int4"),)),
        "duo_int4_pages": Recipe((paged_chain("int4", "token", heads="retrieval"), duo(codec=Int(4))[1])),
        "duo_int4": Recipe(duo(codec=Int(4))),
        "sink_window": Recipe((Segment(policy=SinkWindow(4, TOKENS - 4), **plain),)),
        "h2o": Recipe((Segment(policy=H2O(TOKENS), **plain),)),
        "quest": Recipe((Segment(**plain),), Quest(1_024)),
    }


def shapes_of(config, dtype) -> Layers:
    """The model's shapes without its weights."""
    weights = {n: jax.ShapeDtypeStruct(s, dtype) for n, s in param_shapes(config).items()}

    def block(i):
        start = f"layers.{i}."
        arrays = {n.removeprefix(start): w for n, w in weights.items() if n.startswith(start)}
        return nnx.split(nnx.eval_shape(lambda: Block({n: jnp.zeros(w.shape, w.dtype) for n, w in arrays.items()})))

    layers = tuple(block(i) for i in range(config.num_layers))
    return Layers(config, weights["embed"], weights["norm"], weights["lm_head"], layers)


def block_memory(*step, **more):
    """XLA's memory plan of `compiled_block`."""
    return compiled_block(*step, **more).memory_analysis()


@cache
def compiled_block(recipe, phase, tokens, dtype, target, implementation=None, text=TOKENS):
    """The last layer's block for a step of `tokens` tokens of a text; by default as a session on the target runs it."""
    implementation = implementation or resolve(None, target.capability if target else None)
    layers = shapes_of(LLAMA3_8B, dtype)
    aux = HALF if any(c[0].heads != "all" for c in recipe.chains) else None
    session = Session(layers, recipe, text, 0, aux=aux, implementation=implementation)
    layer = LLAMA3_8B.num_layers - 1
    cache = jax.eval_shape(lambda: session.empty(phase, layer))
    args, static = session.block_call(phase, layer, *session.step_shape(tokens), cache)
    return compile_for(target, block_program, args, static)


def logits_memory(dtype, target):
    """XLA's memory plan of the logits of one token."""
    layers = shapes_of(LLAMA3_8B, dtype)
    x = jax.ShapeDtypeStruct((1, LLAMA3_8B.d_model), dtype)
    args = (x, layers.norm, layers.head)
    static = {"eps": LLAMA3_8B.norm_eps, "tied": False}
    return compile_for(target, logits_program, args, static).memory_analysis()


@cache
def h200():
    target = gpu_target("h200")
    try:
        compile_device(target)
    except UserError as error:
        pytest.skip(str(error))
    return target


def check(recipe, phase, tokens, dtype, target, gib):
    plan = block_memory(recipe, phase, tokens, dtype, target)
    # the donated cache is written in place: all of it is both argument and result
    assert plan.alias_size_in_bytes > 0.9 * cache_bytes(recipe, phase, dtype)
    assert plan.temp_size_in_bytes <= gib * GIB, f"{plan.temp_size_in_bytes / GIB:.3f} GiB"


@cache
def cache_bytes(recipe, phase, dtype):
    """Of the layer that `block_memory` compiles."""
    aux = HALF if any(c[0].heads != "all" for c in recipe.chains) else None
    layer = LLAMA3_8B.num_layers - 1
    make = lambda: recipe.init_layer(phase, layer, Shape(LLAMA3_8B, TOKENS, dtype=dtype), aux)
    return shape_bytes(jax.eval_shape(make))


DEFAULT = ("dense", "duo_int4_pages")
NAMES = [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in recipes(None)]


@pytest.mark.parametrize("name", NAMES)
def test_decode_on_an_h200_needs_little_beside_the_cache(name):
    check(recipes(None)[name], "decode", 1, jnp.bfloat16, h200(), 0.05)


@pytest.mark.parametrize("name", NAMES)
def test_a_chunk_on_an_h200_needs_little_beside_the_cache(name):
    check(recipes(None)[name], "prefill", CHUNK, jnp.bfloat16, h200(), 0.4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("phase,tokens", [("decode", 1), pytest.param("prefill", CHUNK, marks=pytest.mark.slow)])
def test_the_kernels_need_no_more_than_xla(name, phase, tokens):
    """But for half a MiB in decode: parts of a split step, lists, and this step's own token padded to a tile."""
    plans = [
        block_memory(recipes(None)[name], phase, tokens, jnp.bfloat16, h200(), implementation)
        for implementation in ("xla", AUTO)
    ]
    assert plans[0].argument_size_in_bytes == plans[1].argument_size_in_bytes
    assert plans[1].temp_size_in_bytes <= plans[0].temp_size_in_bytes + (2**19 if phase == "decode" else 0)


@pytest.mark.parametrize("name", NAMES)
def test_decode_on_a_cpu_needs_little_beside_the_cache(name):
    check(recipes(Cast("bfloat16"))[name], "decode", 1, jnp.float32, None, 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_a_chunk_on_a_cpu_needs_little_beside_the_cache(name):
    check(recipes(Cast("bfloat16"))[name], "prefill", CHUNK, jnp.float32, None, 0.75)


@pytest.mark.slow
def test_block_lists_over_a_chunk_and_what_is_held_go_through_the_kernel():
    step = Recipe(pattern=XAttention()), "prefill", 4_096, jnp.bfloat16, h200()
    plan = block_memory(*step)
    assert plan.temp_size_in_bytes <= GIB, f"{plan.temp_size_in_bytes / GIB:.3f} GiB"
    # `attend` for the held blocks and for the chunk's own; XLA alone calls none
    assert compiled_block(*step).as_text().count('custom_call_target="mosaic_gpu') == 2
    assert "mosaic_gpu" not in compiled_block(*step, "xla").as_text()


@pytest.mark.slow
@pytest.mark.timeout(1_500)
def test_vertical_slash_prefill_grows_with_the_prompt_alone():
    """650,240 tokens in one step: 42 kB of scratch a token at 131,072, and no more at five times as many."""
    temp = {}
    for tokens in (TOKENS, 650_240):
        step = Recipe(pattern=MInference()), "prefill", tokens, jnp.bfloat16, h200()
        program = compiled_block(*step, text=tokens)
        temp[tokens] = program.memory_analysis().temp_size_in_bytes
        # its estimate, and the tiles: of the rows that fill a step of the loop, and of the rest
        kernels = program.as_text().count('custom_call_target="mosaic_gpu')
        assert kernels == 3 + (tokens % LISTED_ROWS > 0)
    assert temp[TOKENS] <= 6e9
    assert temp[650_240] / 650_240 <= temp[TOKENS] / TOKENS


def test_logits_of_the_last_token_need_no_copy_of_the_head():
    assert logits_memory(jnp.bfloat16, h200()).temp_size_in_bytes <= 0.05 * GIB
    assert logits_memory(jnp.float32, None).temp_size_in_bytes <= 0.1 * GIB


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_compiles_a_program_that_writes_in_place(name):
    h200()
    add = jax.jit(lambda x, y: x.at[3].add(y), donate_argnums=0)
    x, y = jax.ShapeDtypeStruct((1_024, 256), jnp.bfloat16), jax.ShapeDtypeStruct((256,), jnp.bfloat16)
    plan = compile_for(gpu_target(name), add, (x, y)).memory_analysis()
    assert plan.alias_size_in_bytes == plan.output_size_in_bytes == 1_024 * 256 * 2


def test_an_unknown_target_is_named_with_the_nearest():
    with pytest.raises(UserError, match=r"target='h20'.*did you mean 'h200'"):
        gpu_target("h20")
