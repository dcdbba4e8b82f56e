"""Which tokens stay?  One file per method."""
