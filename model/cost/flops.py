"""FLOPs of the decoder's building blocks, by the unit that does them.

From "Model FLOPs Utilization" (mfu-formulas): its names are tensor core, CUDA core and SFU; ours
are `matrix` (tensor or matrix cores), `vector` (CUDA cores, VALU) and `special` (exp, rsqrt).
Every function takes `tokens` = batch · query tokens and counts one layer's forward pass, or its
backward pass alone. Pure integers; nothing here imports torch.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by unit; a multiply-add is two."""

    matrix: int = 0
    vector: int = 0
    special: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            self.matrix + other.matrix, self.vector + other.vector, self.special + other.special
        )

    def __mul__(self, times: int) -> "Flops":
        return Flops(self.matrix * times, self.vector * times, self.special * times)


def linear(
    tokens: int, inputs: int, outputs: int, bias: bool = False, backward: bool = False
) -> Flops:
    """x [tokens, inputs] → [tokens, outputs]: 2·T·in·out, and T·out for a bias.

    Backward is twice the forward: one product for the weight's gradient, one for the input's;
    the bias' gradient is a sum over tokens, T·out.
    """
    products = 2 if backward else 1
    return Flops(products * 2 * tokens * inputs * outputs, tokens * outputs if bias else 0)


def rms_norm(tokens: int, size: int, backward: bool = False) -> Flops:
    """x [tokens, size]: 4·T·D + 2·T vector and T special (rsqrt); backward 11·T·D + 2·T vector."""
    if backward:
        return Flops(vector=11 * tokens * size + 2 * tokens)
    return Flops(vector=4 * tokens * size + 2 * tokens, special=tokens)


def rotary(tokens: int, heads: int, head_dim: int) -> Flops:
    """Turn [tokens, heads, head_dim]: two products and a sum each, backward the same."""
    return Flops(vector=3 * tokens * heads * head_dim)


def attention(pairs: int, heads: int, head_dim: int, backward: bool = False) -> Flops:
    """Scores, softmax and values over `pairs` = Σ over query tokens of positions attended.

    Forward, a pair and head: 4·head_dim matrix; scaling 1 and softmax 3 vector (its maximum,
    difference and sum or division); 1 special (exp). Backward: four products where the forward
    has two; 5 vector for the softmax (P·dP, its sum, difference, product) and the scaling, which
    the document leaves open.
    """
    if backward:
        return Flops(8 * pairs * heads * head_dim, 5 * pairs * heads)
    return Flops(4 * pairs * heads * head_dim, 4 * pairs * heads, pairs * heads)


def softmax(rows: int, size: int, backward: bool = False) -> Flops:
    """Softmax of [rows, size]: 3 vector and 1 special an element, as in attention."""
    if backward:
        return Flops(vector=4 * rows * size)
    return Flops(vector=3 * rows * size, special=rows * size)


def swiglu(tokens: int, size: int, backward: bool = False) -> Flops:
    """[tokens, 2·size] → [tokens, size]: 2·T·I vector and T·I special; backward 6·T·I vector.

    The document counts silu's sum and division and not the product with `up`; nor are gpt-oss'
    clamps counted here.
    """
    if backward:
        return Flops(vector=6 * tokens * size)
    return Flops(vector=2 * tokens * size, special=tokens * size)


def weighted_sum(tokens: int, terms: int, size: int, backward: bool = False) -> Flops:
    """Σ of `terms` expert outputs [tokens, size] with the router's weights: 2·T·k·D vector.

    Backward: T·k·D for the outputs' gradient and 2·T·k·D for the weights'.
    """
    return Flops(vector=(3 if backward else 2) * tokens * terms * size)


def tiled_matmul_intensity(inner: int, block_m: int, block_n: int) -> float:
    """FLOPs a word moved by a tiled product C[M, N] = A[M, K] · B[K, N], K = `inner`.

    2 / (2/K + 1/BLOCK_N + 1/BLOCK_M): C is read and written once, A is read once for each column
    of blocks, B once for each row (mfu-formulas, "matmul CI").
    """
    if min(inner, block_m, block_n) < 1:
        raise ValueError(f"sizes must be 1 or more, not {inner}, {block_m}, {block_n}")
    return 2 / (2 / inner + 1 / block_n + 1 / block_m)
