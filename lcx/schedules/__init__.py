"""Schedules: the order of the steps.  One file per method."""
