"""`python -m experiments.score --config=configs/X.py --text_file=F --out=F.npz`: negative log likelihood of a text under a method.

Without --prompt_tokens: at every position of one pass, for methods that act in it: patterns, and what a chunked
schedule evicts between steps.  With --prompt_tokens=N --continuation_tokens=M: the prompt is read under the
recipe, then M tokens follow; nll[i] = -log p(token N + i + 1).  --protocol=decode feeds them token by token, as in
generation; --protocol=prompt in one step, in which nothing is evicted.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from absl import flags

from experiments import cli
from lcx.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    cli.define_flags()
    flags.DEFINE_string(
        "text_file", None, "UTF-8 text; the model's bos token is put in front of it where its tokenizer does so."
    )
    flags.DEFINE_integer(
        "num_tokens", None, "Tokens that are read in one pass; the default is the whole text.", lower_bound=2
    )
    flags.DEFINE_integer("prompt_tokens", None, "N, tokens of the prompt.", lower_bound=1)
    flags.DEFINE_integer("continuation_tokens", None, "M, tokens scored after the prompt.", lower_bound=1)
    flags.DEFINE_enum("protocol", None, ["decode", "prompt"], "How the continuation is fed; decode by default.")
    flags.DEFINE_string("out", None, "Where nll (float32) and ids (int32) go, .npz.")


def main() -> None:
    for name in ("config", "text_file", "out"):
        if not getattr(FLAGS, name):
            raise UserError(f"{name}: missing; give --{name}=...")
    prompt, count = FLAGS.prompt_tokens, FLAGS.continuation_tokens
    if (prompt is None) != (count is None):
        raise UserError(f"prompt_tokens={prompt} and continuation_tokens={count}: give both or none")
    if prompt is not None and FLAGS.num_tokens is not None:
        raise UserError(f"num_tokens={FLAGS.num_tokens} and prompt_tokens={prompt}: give one of them")
    if prompt is None and FLAGS.protocol is not None:
        raise UserError(f"protocol={FLAGS.protocol!r} is of a continuation; give prompt_tokens and continuation_tokens")
    protocol = FLAGS.protocol or "decode"
    out = Path(FLAGS.out)
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise UserError(f"out={FLAGS.out!r}: allowed is a .npz file in a folder that exists")
    cli.check_writable("out", out)
    experiment = cli.experiment()
    cli.check_model_free(experiment)
    text = cli.read_text(FLAGS.text_file)
    model = cli.load(experiment)

    import numpy as np

    from lcx.measure.quality import score_continuation, score_text

    ids = model.tokenizer.text_ids(text)
    wanted = (FLAGS.num_tokens or len(ids)) if prompt is None else prompt + count + 1
    if len(ids) < wanted:
        raise UserError(f"text_file={FLAGS.text_file!r} has {len(ids)} tokens, {wanted} are needed")
    model.check_length(wanted - 1, FLAGS.allow_extrapolation)
    experiment = cli.with_budget(experiment, prompt or wanted - 1)
    if prompt is None:
        score = score_text(model.layers, experiment, ids[:wanted])
    else:
        score = score_continuation(model.layers, experiment, ids[:wanted], prompt, protocol=protocol)
    with out.open("wb") as file:
        np.savez_compressed(file, nll=score.nll, ids=score.ids)
    line = {
        "mean_nll": round(score.mean, 6),
        # above 709 nats a token it is infinite, which JSON has no word for
        "ppl": round(score.perplexity, 4) if math.isfinite(score.perplexity) else None,
        "tokens": len(score.nll),
        "protocol": "one pass" if prompt is None else protocol,
        "cache_bytes": score.cache_bytes,
        "seconds": round(score.seconds, 3),
        "out": str(out),
    }
    print(json.dumps(line, allow_nan=False))


if __name__ == "__main__":
    define_flags()
    cli.run("score", main)
