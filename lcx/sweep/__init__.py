"""Recipes x context lengths on one model: points, their store, the runner and the figure."""
