"""The operations of the decoder: `backend.Backend` defines them, one class a device speeds them up.

`specs` has what operations take besides activations, `forward_batch` the input of a forward pass.
"""
