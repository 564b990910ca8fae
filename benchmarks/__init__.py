"""Time and memory of operators, layers and models against the usual alternatives: `python -m benchmarks --help`."""
