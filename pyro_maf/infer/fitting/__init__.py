"""Fit of a guide: its steps, learning rate and end."""
