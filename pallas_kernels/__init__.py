"""Attention kernels in Pallas Mosaic GPU for Hopper (compute capability 9.0); docs/kernels.md has their design and figures.

`attend` is attention over lists of tiles, forward; `attend_bwd` adds gradients; `decode` is split-KV attention over pages of exact or
quantised keys and values (`payloads`).  `score_blocks` ranks blocks by pooled keys, antidiagonals or page extremes; `score_probe` ranks
columns and diagonals by the last queries.  `lcx.ops` has the plain references; `lcx.backends.choose` chooses.

Beside them: `inputs` checks and pads arguments, `lists` makes lists of tiles, `mask` is causal, window and sinks, `pieces` splits keys over
multiprocessors and merges, `registers` has what the bodies share, `tables` the tile sizes.
"""
