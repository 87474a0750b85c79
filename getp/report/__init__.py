"""The report of a finished job: its figures, its efficiency, and their table."""
