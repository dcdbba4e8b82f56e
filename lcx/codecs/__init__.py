"""Codecs: the format of a slot.  One file per method."""
