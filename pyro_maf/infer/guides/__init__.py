"""Flows as guides of Pyro models: a single flow or a mixture, and saved guides."""
