"""The command line: one file a command; heavy imports happen inside the commands, so that `--help` answers at once."""

from deltatune.cli.app import main

__all__ = ["main"]
