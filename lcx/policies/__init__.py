"""Policies: the tokens that stay.  One file per method."""
