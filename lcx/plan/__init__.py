"""Plans of a model with a long context on devices that are not installed: memory from XLA's own compiler, times from a roofline.

from lcx.plan import plan
rows = plan(shape("llama3-8b"), {"dense": load_config("configs/dense.py")}, ["h200"], [131_072])
"""

from lcx.plan.devices import Device, device
from lcx.plan.models import shape
from lcx.plan.rows import PlanRow, estimate, plan

__all__ = ["Device", "PlanRow", "device", "estimate", "plan", "shape"]
