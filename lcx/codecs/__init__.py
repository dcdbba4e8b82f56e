"""How is a slot written?  One file per method."""
