"""Mode doctor: whether this machine is well, check by check.

`examine` is the whole examination. Whatever imports torch or runs a kernel is done in child
processes (`child`, started by `processes`), so that a crash there is a finding like any other.
"""
