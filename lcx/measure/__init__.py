"""What a run costs and what it is worth: memory, latency, quality."""
