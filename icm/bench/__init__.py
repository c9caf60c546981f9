"""Measurements of speed, each in a process of its own."""
