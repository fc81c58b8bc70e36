"""The trainer: configuration, activations of a real transformer, the loop, and what it measures."""
