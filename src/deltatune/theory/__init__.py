"""The two theories of delta tuning as measuring instruments: optimization and optimal control (Ding et al., 2022, section 4)."""
