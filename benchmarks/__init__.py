"""What the product claims, measured: each module is a program, `python -m benchmarks.<module>` from the repository."""
