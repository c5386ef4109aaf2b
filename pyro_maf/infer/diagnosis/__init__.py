"""Reliability of a guide: its importance weights, their tail, and modes that the guide has missed."""
