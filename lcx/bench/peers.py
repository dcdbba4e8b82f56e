"""Other people's attention on the same card: each peer is optional, and names the reason where it is absent."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from lcx.bench.cases import SCORES, Case
from lcx.bench.decode import calls
from lcx.bench.timing import Timed, jax_timer, repeated, torch_timer

FA3_DECODE = ((4, 64), (16, 64), (4, 256), (16, 256))  # splits of a row, tokens of a page: the best of them counts


class Absent(Exception):
    """Reason why a peer cannot take part in a row."""


def timers(case: Case, ours: tuple[Any, ...]) -> Iterator[tuple[str, Callable[[], Timed]]]:
    """Yield (name, maker of a timer) for every peer; the maker raises Absent, or whatever the peer does.

    Args:
      case: a row.
      ours: arguments of our program, of which q, k and v are taken where they are that.
    """
    # the peers of plain arrays through lcx are those of the row of pages
    if case.kernel in (*SCORES, "decode_slots"):
        return
    # a decode row has pages; its peers read plain arrays
    args = cache(lambda: ours[:3] if case.kernel != "decode" else case.arrays())
    pool = cache(lambda: _pool(case))
    yield "cudnn", lambda: _cudnn(case, args)
    if case.kernel == "decode":
        for splits, page in FA3_DECODE:
            yield f"fa3-jax splits {splits} page {page}", lambda s=splits, p=page: _fa3_decode(case, pool, s, p)
    else:
        yield "fa3-jax", lambda: _fa3(case, args)
    yield "tokamax", lambda: _tokamax(case, args)
    yield "torch-flash", lambda: _torch(case, "FLASH_ATTENTION")
    yield "torch-cudnn", lambda: _torch(case, "CUDNN_ATTENTION")
    yield "flex_attention", lambda: _flex(case)


def _need(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"{name} does not import: {error}") from None


def _plain(case: Case) -> None:
    if case.payload != "bf16":
        raise Absent("reads 16-bit keys")
    if case.density is not None:
        raise Absent("takes no list of tiles")
    if case.window is not None:
        raise Absent("takes no window with sinks")


def _tokens_first(args):
    """Return q [B,T,H,D], k and v [B,S,K,D], in the field's layout; made before the clock runs."""
    import jax.numpy as jnp

    q, k, v = args()
    B, K, G, T, D = q.shape
    return q.reshape(B, K * G, T, D).swapaxes(1, 2), jnp.moveaxis(k, 3, 1), v.swapaxes(1, 2)


def _maybe_gradient(case: Case, fn: Callable) -> Callable:
    if case.kernel != "backward":
        return fn
    import jax
    import jax.numpy as jnp

    return lambda *qkv: jax.grad(lambda *x: fn(*x).astype(jnp.float32).sum(), (0, 1, 2))(*qkv)


def _cudnn(case: Case, args) -> Timed:
    import jax

    _plain(case)
    # one query row per text sees everything: no mask, where causal would hide all but the first key
    causal = case.kernel != "decode"
    run = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")
    return jax_timer(_maybe_gradient(case, run), _tokens_first(args))


def _fa3(case: Case, args) -> Timed:
    _plain(case)
    if case.head_dim != 128:
        raise Absent("its wheel serves only head_dim 128")
    module = _need("flash_attn3_jax")
    run = lambda q, k, v: module.flash_mha(q, k, v, softmax_scale=case.head_dim**-0.5, is_causal=True)
    return jax_timer(_maybe_gradient(case, run), _tokens_first(args))


def _pool(case: Case):
    """Return q, keys, values [pages,64,K,D] and shuffled tables [sets,B,pages of 64] of FA3, as many sets as ours."""
    import jax
    import jax.numpy as jnp

    B, K, D, sets = case.batch, case.kv_heads, case.head_dim, calls(case)
    most = max(page for _, page in FA3_DECODE)
    n = -(-case.tokens // most) * most // 64
    keys = jax.random.split(jax.random.key(1), 4)
    k, v = (jax.random.normal(key, (sets * B * n, 64, K, D), jnp.bfloat16) for key in keys[:2])
    q = jax.random.normal(keys[2], (B, case.T, case.heads, D), jnp.bfloat16)
    tables = {}
    for _, page in FA3_DECODE:
        many = sets * B * n * 64 // page
        tables[page] = jax.random.permutation(keys[3], many).astype(jnp.int32).reshape(sets, B, -1)
    return q, k, v, tables


def _fa3_decode(case: Case, pool: Callable, splits: int, page: int) -> Timed:
    import jax.numpy as jnp

    _plain(case)
    if case.head_dim != 128:
        raise Absent("its wheel serves only head_dim 128")
    attend = _need("flash_attn3_jax").flash_mha_with_kvcache
    q, k, v, tables = pool()
    length = jnp.full((case.batch,), case.tokens, jnp.int32)
    settings: dict[str, Any] = {"softmax_scale": case.head_dim**-0.5, "is_causal": True, "num_splits": splits}

    def run(q, k, v, tables, length):
        k, v = (x.reshape(-1, page, *x.shape[2:]) for x in (k, v))
        return [attend(q, k, v, cache_seqlens=length, page_table=table, **settings) for table in tables]

    return repeated(jax_timer(run, (q, k, v, tables[page], length)), tables[page].shape[0])


def _tokamax(case: Case, args) -> Timed:
    _plain(case)
    module = _need("tokamax")
    if case.kernel == "decode":
        raise Absent("serves prefill shapes")
    run = lambda q, k, v: module.dot_product_attention(q, k, v, is_causal=True, implementation="mosaic")
    return jax_timer(_maybe_gradient(case, run), _tokens_first(args))


def _torch_arrays(case: Case):
    if case.payload != "bf16":
        raise Absent("reads 16-bit keys")
    torch = _need("torch")
    if not torch.cuda.is_available():
        raise Absent("torch sees no GPU")
    B, K, D = case.batch, case.kv_heads, case.head_dim
    sizes = ((B, case.heads, case.T, D), (B, K, case.tokens, D), (B, K, case.tokens, D))
    needs = case.kernel == "backward"
    return torch, [torch.randn(s, dtype=torch.bfloat16, device="cuda", requires_grad=needs) for s in sizes]


def _torch_run(case: Case, arrays, forward: Callable) -> Timed:
    if case.kernel != "backward":
        return torch_timer(forward)
    torch = importlib.import_module("torch")
    # our row is a forward pass and its gradients, so theirs is too
    return torch_timer(lambda: torch.autograd.grad(forward().sum(), arrays))


def _torch(case: Case, backend: str) -> Timed:
    _plain(case)
    torch, arrays = _torch_arrays(case)
    attention = importlib.import_module("torch.nn.attention")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    causal = case.kernel != "decode"

    def forward():
        with attention.sdpa_kernel(getattr(attention.SDPBackend, backend)):
            return sdpa(*arrays, is_causal=causal, enable_gqa=True)

    return _torch_run(case, arrays, forward)


def _flex(case: Case) -> Timed:
    """Return compiled flex_attention; its BlockMask is the same causal mask, or the same tiles."""
    torch, arrays = _torch_arrays(case)
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    offset, mask = case.tokens - case.T, case.mask
    tiles = None if case.density is None else torch.tensor(case.chosen()[0], device="cuda")

    def allow(b, h, q, kv):
        seen = kv <= q + offset
        if mask.window is not None:
            seen = seen & ((q + offset - kv < mask.window) | (kv < mask.sink))
        return seen if tiles is None else seen & tiles[h, q // 128, kv // 128]

    heads = None if tiles is None else case.heads
    block = flex.create_block_mask(allow, None, heads, case.T, case.tokens, device="cuda", _compile=True)
    compiled = torch.compile(flex.flex_attention)
    return _torch_run(case, arrays, lambda: compiled(*arrays, block_mask=block, enable_gqa=True))
