"""`python -m modprune`."""

from modprune.cli import main

main()
