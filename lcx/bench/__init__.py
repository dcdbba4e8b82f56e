"""The benchmark of the kernels: what is measured, against whom, how times are taken, and what stands for the GPU where there is none."""
