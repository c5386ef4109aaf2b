"""Fitting a guide: its steps, learning rate and stopping."""
