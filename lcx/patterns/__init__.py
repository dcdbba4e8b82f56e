"""Which keys does a query read?  One file per method."""
