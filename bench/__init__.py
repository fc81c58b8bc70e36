"""Benchmarks of the ops against what one would write without them, and the report that shows them."""
