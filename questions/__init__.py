"""Data sets: reading the questions that a run trains on, and making them from published files."""
