"""Conformance of a method: what must hold for every recipe, checked on a small random model.

    results = lcx.check(recipe)

The suite in tests/ runs the same functions on every config.
"""

from lcx.conformance.run import CHECKS, Result, check, run_check
from lcx.conformance.subject import Subject

__all__ = ["CHECKS", "Result", "Subject", "check", "run_check"]
