"""Time and memory of operators, layers and models against what one would use instead: `python -m benchmarks --help`."""
