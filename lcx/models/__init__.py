"""The decoder, its rotary positions, and loading it."""
