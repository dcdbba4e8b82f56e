"""Cost and quality of a run: memory, latency, likelihood, tasks."""
