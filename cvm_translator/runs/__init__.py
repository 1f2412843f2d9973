"""The run folder: where things lie, how they are written, who holds it. Standard library only."""
