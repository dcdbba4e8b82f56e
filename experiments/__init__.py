"""Commands that hold flags; their functions can be imported from lcx."""
