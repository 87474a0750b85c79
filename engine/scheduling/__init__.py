"""Which sequences run in the next step and which KV blocks they hold: integers, no tensors."""
