"""Which tensors of a checkpoint fill which parameters of the decoder.

A parameter may consist of several tensors (q, k and v of one fused weight, the experts of a
stack), and a tensor may contain several parts of a parameter (a fused gate and up). Each pair of
a tensor and a part is a `Piece`; `tensor_map` returns those of a model.
"""
