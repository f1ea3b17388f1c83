"""`python -m deltatune.cli` is the `deltatune` command."""

from deltatune.cli.app import main

main()
