"""A training run as a process that a test can watch and hurt."""

from benchmarks.lives import Life, lines_of, living, small_run

__all__ = ["Life", "lines_of", "living", "small_run"]
