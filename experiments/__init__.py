"""Commands: flags only; what they do can be imported from lcx."""
