"""Addition: new parameters beside the old ones (Ding et al., 2022, section 3.1)."""
