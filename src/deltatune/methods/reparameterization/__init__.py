"""Reparameterization: the old parameters rewritten through fewer new ones (Ding et al., 2022, section 3.3)."""
