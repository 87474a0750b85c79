"""The operations of the decoder: `backend.Backend` defines them in torch.

A subclass for each kind of device (`cpu`, `triton`) overrides them with faster kernels. `specs` has
their arguments besides activations, `forward_batch` the input of a forward pass. Operations know
nothing of families, checkpoints or sequences.
"""
