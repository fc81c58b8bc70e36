"""Factors over the steps of a run, counted from 0."""


def warmup(step: int, n_steps: float) -> float:
    """Rises in a straight line from near 0 to 1, which it reaches after n_steps."""
    return min(1.0, (step + 1) / (n_steps + 1))


def decay(step: int, steps: int, n_steps: float) -> float:
    """1, then a straight line towards 0 over the last n_steps of so many."""
    left = steps - step
    return left / n_steps if left < n_steps else 1.0
