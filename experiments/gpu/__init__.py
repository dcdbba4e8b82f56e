"""What `experiments.bench_gpu` measures, against whom, and how it takes times."""
