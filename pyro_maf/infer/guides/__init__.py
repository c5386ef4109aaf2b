"""Flows as guides of Pyro models: one, or a mixture of them, and what is saved of it."""
