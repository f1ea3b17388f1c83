"""The two theories on real runs: what `docs/theory.md` and `docs/results/theory/` are made from. `python -m studies.theory --help`."""
