"""The core: deltas as values, and the one place that touches a live model. Torch only."""
