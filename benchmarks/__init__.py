"""Benchmarks: what attaching and training cost, against peft and against the limit; `make bench` runs them."""
