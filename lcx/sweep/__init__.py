"""Recipes x context lengths on one model: points, their store, and the runner."""
