"""Mode doctor: checks that this machine works.

`examine` runs all checks. Whatever imports torch or runs a kernel is done in child
processes (`child`, started by `processes`), so that a crash there is a finding like any other.
"""
