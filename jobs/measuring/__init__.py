"""Policies on held-out questions, and runs beside each other."""
