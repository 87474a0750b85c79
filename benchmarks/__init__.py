"""Timings against peers and against limits; see each file."""
