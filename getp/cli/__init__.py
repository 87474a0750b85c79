"""The command line: options become frozen dataclasses, and each mode is one file in `modes`.

Only this package names options: errors and warnings from elsewhere name settings, which `wording`
translates.
"""
