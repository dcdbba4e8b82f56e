"""Writes tests/data/peers_families.npz: logits of transformers on the checkpoints of `small_checkpoints.py`, one forward pass each, float32.

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


def logits(name: str) -> np.ndarray:
    """float32 [T,V] of a case."""
    raw = small.config_json(name)
    kind = getattr(transformers, raw["architectures"][0])
    config = kind.config_class.from_dict(json.loads(json.dumps(raw)))
    model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    state = {key: torch.from_numpy(x) for key, x in small.weights(name).items()}
    if raw["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    with torch.no_grad():
        return model(torch.from_numpy(small.ids(name))[None]).logits[0].numpy()


def main() -> None:
    arrays = {}
    for name in small.CASES:
        x = logits(name)
        # every third position, the last one included: the file stays small
        arrays[name] = x[(len(x) - 1) % 3 :: 3]
        print(f"{name}: {x.shape}, spread {x.std():.2f}")
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    np.savez_compressed(OUT, **arrays, meta=json.dumps(versions))


if __name__ == "__main__":
    main()
