"""Speed of Hugging Face transformers (SDPA, float32) on the SmolLM2 weights: a child process that answers commands.

One command a line on stdin, one JSON line each on stdout; "ready" comes first, end of input ends the process.

  prefill 512              {"seconds": s}         one step over 512 tokens into an empty cache, last-token logits only
  decode 4096 16           {"seconds": [s, ...]}  16 steps of one token after a context of 4,096 tokens
  decode_static 4096 16    the same with a preallocated StaticCache instead of the growing DynamicCache
  quit

Every shape is run untimed before its first timed run.  The context of a decode is prefilled once per length and kept;
each step's token is cropped away again (untimed), so every step sees the same number of tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

import torch
import transformers
from transformers import DynamicCache, StaticCache

# isort: split
from smollm2_hf import load_model


class Bench:
    """The model, its inputs and the contexts prefilled so far."""

    def __init__(self, attention, seed=0):
        self.model = load_model(attention=attention)
        generator = torch.Generator().manual_seed(seed)
        # the first 17 ids are special tokens; the speed does not depend on the text
        self.ids = torch.randint(17, self.model.config.vocab_size, (1, 8_192), generator=generator)
        self.contexts = {}
        self.warm = set()

    def step(self, start, end, cache):
        """Return the seconds of one call over tokens start..end-1, last-token logits only."""
        begin = time.perf_counter()
        self.model(
            self.ids[:, start:end],
            past_key_values=cache,
            cache_position=torch.arange(start, end),
            use_cache=True,
            logits_to_keep=1,
        )
        return time.perf_counter() - begin

    def prefill(self, num_tokens):
        if ("prefill", num_tokens) not in self.warm:
            self.step(0, num_tokens, DynamicCache(config=self.model.config))
            self.warm.add(("prefill", num_tokens))
        return self.step(0, num_tokens, DynamicCache(config=self.model.config))

    def decode(self, context, num_steps):
        cache = self.context("decode", context, lambda: DynamicCache(config=self.model.config))
        seconds = []
        for _ in range(num_steps):
            seconds.append(self.step(context, context + 1, cache))
            cache.crop(context)
        return seconds

    def decode_static(self, context, num_steps):
        cache = self.context("static", context, lambda: StaticCache(self.model.config, max_cache_len=context + 1))
        # the slot of position `context` is written again by every step: nothing to crop
        return [self.step(context, context + 1, cache) for _ in range(num_steps)]

    def context(self, kind, num_tokens, make):
        """Return the prefilled cache of this kind and length, made and decoded from twice on first use."""
        if (kind, num_tokens) not in self.contexts:
            cache = self.contexts[kind, num_tokens] = make()
            self.step(0, num_tokens, cache)
            for _ in range(2):
                self.step(num_tokens, num_tokens + 1, cache)
                if isinstance(cache, DynamicCache):
                    cache.crop(num_tokens)
        return self.contexts[kind, num_tokens]

    def answer(self, line):
        """Return the answer to one command as a dict; a command that is not understood gives {"error": ...}."""
        command, *numbers = line.split()
        arity = {"prefill": 1, "decode": 2, "decode_static": 2}
        if command not in arity or len(numbers) != arity[command] or not all(number.isdigit() for number in numbers):
            return {"error": f"unknown command {line!r}; use prefill T, decode T STEPS, decode_static T STEPS or quit"}
        if not 1 <= int(numbers[0]) < self.ids.shape[1]:
            return {"error": f"{line!r}: lengths are 1 to {self.ids.shape[1] - 1} tokens"}
        return {"command": line, "seconds": getattr(self, command)(*map(int, numbers))}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--attention", default="sdpa", choices=("sdpa", "eager"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    with torch.inference_mode():
        bench = Bench(args.attention)
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps({"ready": True, "attention": args.attention, "threads": args.threads, **versions}), flush=True)
        for line in map(str.strip, sys.stdin):
            if line == "quit":
                break
            if line:
                print(json.dumps(bench.answer(line)), flush=True)


if __name__ == "__main__":
    main()
