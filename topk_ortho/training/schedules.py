"""Factors of the learning rate and of weights in the course of a run; steps count from 0."""


def warmup(step: int, n_steps: float) -> float:
    """A factor that rises in a straight line from near 0 to 1, which it reaches after n_steps."""
    return min(1.0, (step + 1) / (n_steps + 1))


def annealed(first: int, last: int, step: int, n_steps: float) -> int:
    """A whole number that goes from the first to the last in a straight line, and arrives after n_steps."""
    return round(last + (first - last) * max(0.0, 1 - step / n_steps)) if n_steps else last


def decay(step: int, steps: int, n_steps: float) -> float:
    """A factor that is 1 at first, and falls in a straight line towards 0 over the last n_steps of all steps."""
    left = steps - step
    return left / n_steps if left < n_steps else 1.0
