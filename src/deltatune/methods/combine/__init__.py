"""Combinators: methods made of methods (Ding et al., 2022, section 5.2)."""
