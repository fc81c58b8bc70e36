"""Each kernel alone, against float64 NumPy that shares no code with it."""
