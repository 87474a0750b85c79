"""Cost predictions and measured profiles, and how they are printed and drawn."""
