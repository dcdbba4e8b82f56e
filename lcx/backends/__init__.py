"""Code that computes attention: XLA, the kernels for Hopper, cuDNN."""
