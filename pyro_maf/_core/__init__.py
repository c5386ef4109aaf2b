"""Utilities that need only torch and Python: checks, states of torch, random numbers, files, progress, interruption."""
