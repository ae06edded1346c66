"""Evaluation by lm-eval: the offline suite, the paper's suites, answers kept item by item."""
