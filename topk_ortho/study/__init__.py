"""Studies: many training runs over settings and seeds, and their comparison.

`plan.py` reads a study file and says which runs it asks for, `execute.py` trains them in parallel, `benchmark.py` has
SAEBench judge them, `results.py` gathers their numbers and compares them with a baseline, `figures.py` and `report.py`
show the outcome.
"""
