"""Initialisation of a guide: ascents to the modes of a posterior, and normals around them."""
