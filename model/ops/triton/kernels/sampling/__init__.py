"""The kernels that sample the rows of a step: `choose.py` describes them."""
