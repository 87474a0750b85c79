"""The command line: options become settings, one file a mode."""
