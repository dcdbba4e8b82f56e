"""Search for the first value of a run that is not finite: the run is repeated with every layer's output checked."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from lcx.session import Session


def first_not_finite(session: Session, run: Callable[[], object]) -> str:
    """Run again from an empty cache and name the first layer and step whose output is not finite.

    Args:
      session: forgets its texts.
      run: the run that gave the value: prefill, then steps, of this session.
    """
    places: list[str] = []
    steps = {"prefill": 0, "decode": 0}

    def watch(phase: str, layer: int, x: jax.Array) -> None:
        if layer == 0:
            steps[phase] = steps.get(phase, 0) + 1
        if not places and not bool(jnp.isfinite(x).all()):
            last = session.config.num_layers - 1
            places.append(f"layer {layer} (of 0 to {last}), {phase} step {steps[phase]}: output not finite")

    session.reset()
    session.watch = watch
    try:
        run()
    finally:
        session.watch = None
    return places[0] if places else "logits: not finite, though every layer's output is"
