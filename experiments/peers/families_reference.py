"""Write tests/data/peers_families.npz: logits and RoPE of transformers on the checkpoints of `small_checkpoints.py`, float32.

Run it in the peers' environment: `.venv-peers/bin/python experiments/peers/families_reference.py`.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import small_checkpoints as small
import torch
import transformers

OUT = Path(__file__).parents[2] / "tests" / "data" / "peers_families.npz"


def run(name: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the logits float32 [T,V] of a case, and the inverse frequencies [R/2] and the factor on cos and sin behind them."""
    raw = small.config_json(name)
    kind = getattr(transformers, raw["architectures"][0])
    config = kind.config_class.from_dict(json.loads(json.dumps(raw)))
    model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    state = {key: torch.from_numpy(x) for key, x in small.weights(name).items()}
    if raw["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        x = model(torch.from_numpy(small.ids(name))[None]).logits[0].numpy()
    rope = model.model.rotary_emb
    # Gemma 3 has one for each kind of layer
    inverse = rope.full_attention_inv_freq if hasattr(rope, "full_attention_inv_freq") else rope.inv_freq
    scale = (
        rope.full_attention_attention_scaling
        if hasattr(rope, "full_attention_attention_scaling")
        else rope.attention_scaling
    )
    return x, inverse.numpy(), float(scale)


def main() -> None:
    arrays: dict = {}
    for name in small.CASES:
        x, arrays[f"{name}/inverse"], arrays[f"{name}/scale"] = run(name)
        # every third position, the last one included: the file stays small
        arrays[name] = x[(len(x) - 1) % 3 :: 3]
        print(f"{name}: {x.shape}, spread {x.std():.2f}")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    np.savez_compressed(OUT, **arrays, meta=json.dumps(versions))


if __name__ == "__main__":
    main()
