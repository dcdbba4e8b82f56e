"""Claims of papers about the longest context, for `experiments.plan`; docs/plan.md sets what is predicted beside them."""
