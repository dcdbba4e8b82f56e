"""`python -m experiments.generate --config=configs/X.py --prompt=TEXT`: greedy text under a method, with times and cache bytes."""

from __future__ import annotations

import sys
import time

from absl import flags

from experiments import cli
from lcx.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    cli.define_flags("configs/dense.py")
    flags.DEFINE_string("prompt", None, "What the model continues.")
    flags.DEFINE_string("prompt_file", None, "A UTF-8 text as the prompt.")
    flags.DEFINE_integer("prompt_tokens", None, "Only this number of tokens of the prompt.", lower_bound=1)
    flags.DEFINE_integer("num_tokens", 64, "New tokens at most.", lower_bound=1)
    flags.DEFINE_enum("draft", None, ["lookup"], "Draft tokens by prompt lookup and check them in one step.")
    flags.DEFINE_integer("draft_tokens", 10, "Tokens drafted at most.", lower_bound=1)
    flags.DEFINE_integer("draft_ngram", 2, "Tokens of the longest n-gram that is looked up.", lower_bound=1)
    flags.DEFINE_bool("chat", False, "Put the prompt into the model's chat format.")


def main() -> None:
    if (FLAGS.prompt is None) == (FLAGS.prompt_file is None):
        raise UserError(f"prompt={FLAGS.prompt!r} and prompt_file={FLAGS.prompt_file!r}: give one of them")
    for name in ("draft_tokens", "draft_ngram"):
        if FLAGS.draft is None and FLAGS[name].present:
            raise UserError(f"{name}={FLAGS[name].value} is for drafts; give --draft=lookup too")
    experiment = cli.experiment()
    cli.check_model_free(experiment)
    text = FLAGS.prompt if FLAGS.prompt is not None else cli.read_text(FLAGS.prompt_file)
    model = cli.load(experiment)

    from lcx import checks
    from lcx.greedy import Speculation, all_plain, decides_by_step, generate
    from lcx.measure.memory import peak_rss_bytes
    from lcx.measure.quality import make_session
    from lcx.schedules.lookup import Lookup

    tokenizer = model.tokenizer
    if FLAGS.chat:
        ids = tokenizer.chat([{"role": "user", "content": text}])
    else:
        ids = tokenizer.text_ids(text)
    if FLAGS.prompt_tokens is not None:
        if len(ids) < FLAGS.prompt_tokens:
            raise UserError(f"prompt_tokens={FLAGS.prompt_tokens}: the prompt has {len(ids)} tokens")
        ids = ids[: FLAGS.prompt_tokens]
    if not ids:
        raise UserError(f"prompt={text!r} has no token")
    checks.token_ids(ids, 1, model.config.vocab_size)
    model.check_length(len(ids) + FLAGS.num_tokens - 1, FLAGS.allow_extrapolation)
    session = make_session(model.layers, cli.with_budget(experiment, len(ids)), len(ids), FLAGS.num_tokens - 1)
    draft = None if FLAGS.draft is None else Lookup(FLAGS.draft_tokens, FLAGS.draft_ngram)
    width = 0 if draft is None or FLAGS.num_tokens < 3 else 1 + draft.num_tokens
    why = decides_by_step(session)
    compiled = session.compile(len(ids), [1] if FLAGS.num_tokens > 1 else [], width, as_stored=why is None)
    stream = tokenizer.stream(skip_special=True)
    start = time.perf_counter()
    first = count = 0
    tokens = generate(session, ids, FLAGS.num_tokens, stop=model.stop_ids, choose=model.choose, draft=draft)
    for token in tokens:
        count += 1
        first = first or time.perf_counter() - start
        print(stream.feed(token), end="", flush=True)
    print(stream.finish())
    rest = time.perf_counter() - start - first
    speed = f"{(count - 1) / rest:.1f} tokens/s" if count > 1 else "one token"
    peak = peak_rss_bytes()
    spec = tokens if isinstance(tokens, Speculation) else None
    drafted = "" if spec is None else f" | {spec.accepted} of {spec.drafted} drafted tokens accepted"
    print(
        f"TTFT {first * 1e3:.0f} ms for {len(ids)} tokens | decode {speed}{drafted} | cache {session.cache_bytes:,} bytes"
        f" | compiled in {compiled.seconds:.1f} s" + (f" | peak RSS {peak / 2**30:.2f} GiB" if peak else ""),
        file=sys.stderr,
    )
    if spec is not None:
        # a width of its own sums in another order, and a code at the edge between two may fall to the other side
        edge = "" if all_plain(session) else " and to codes that round the other way"
        same = (
            f"that of plain decoding, up to ties{edge}"
            if why is None
            else f"that of this method fed the same steps: {why}"
        )
        print(f"draft {FLAGS.draft}: {len(spec.widths)} steps; the output is {same}", file=sys.stderr)


if __name__ == "__main__":
    define_flags()
    cli.run("generate", main)
