"""Plain references of attention and of block scores in jax.numpy, for every kernel."""
