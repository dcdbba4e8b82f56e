"""The benchmark of the kernels: cases, peers, timing, and a stand-in for the GPU where there is none."""
