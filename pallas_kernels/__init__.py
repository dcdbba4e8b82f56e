"""Kernels for Hopper with the signatures of the references in lcx.ops.attention.  Empty in this release."""
