"""Learnt and calibrated arrays, checked when they are read."""
