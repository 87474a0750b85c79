"""The operations of the decoder: `backend.Backend` defines them, a class per device speeds them up.

`specs` has the arguments other than activations, `forward_batch` the input of a forward pass.
"""
