"""`python -m getp` is the `getp` command."""

from getp.cli.main import main

main()
