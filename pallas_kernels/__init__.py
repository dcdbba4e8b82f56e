"""Kernels for Hopper with the signatures of the references in lcx.attention.  Empty in this release."""
