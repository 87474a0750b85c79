"""The cost model: FLOPs, bytes, rooflines and devices.

Pure arithmetic without torch, except `measure`, which measures this machine.
"""
