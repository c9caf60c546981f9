"""Whether what docs/reliability.md promises holds: the real program, broken on purpose, often."""
