"""Which code computes attention: XLA, the kernels for Hopper, cuDNN."""
