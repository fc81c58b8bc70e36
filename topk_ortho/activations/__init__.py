"""Activations to learn from, in numbered shards: synthetic ones, and those of a transformer that reads a text.

This package makes data and judges no dictionary. `source.py` says what every source offers; `cache.py`,
`synthetic.py` and `synthsaebench.py` are those that there are; `batches.py` shuffles any of them into training batches.
"""
