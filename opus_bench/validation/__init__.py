"""The sceptic's half: every approximation of the core measured against the exact quantity.

Nothing here makes a number of a training run's record.
"""
