"""Runs of any Task."""
