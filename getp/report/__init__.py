"""What a finished job reports: its figures, its efficiency and how they are printed."""
