"""`python -m getp` is the `getp` command."""

from getp_command import main

main()
