"""`python -m bitfuse` is `bitfuse`."""

from bitfuse.cli import main

main()
