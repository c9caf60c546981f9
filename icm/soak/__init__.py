"""Tests the promises of docs/reliability.md: the real program, broken on purpose, often."""
