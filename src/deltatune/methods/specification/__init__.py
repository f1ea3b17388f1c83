"""Specification: some of the old parameters (Ding et al., 2022, section 3.2)."""
