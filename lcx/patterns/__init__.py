"""Patterns: the keys that a query reads.  One file per method."""
