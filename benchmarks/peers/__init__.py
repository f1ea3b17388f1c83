"""Libraries that need an environment of their own; each file runs there as a process and writes JSON."""
