"""Activations to learn from, in numbered shards: synthetic ones, and those of a transformer that reads a text.

This package makes data and judges no dictionary. `source.py` says what every source offers, `cache.py` and
`synthetic.py` are the two that there are, and `batches.py` shuffles either of them into training batches.
"""
