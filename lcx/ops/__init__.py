"""Plain references of attention and of block scores: what has a kernel, in jax.numpy."""
