"""FLOPs of the decoder's building blocks, by the unit that executes them.

Source: "Model FLOPs Utilization" (mfu-formulas), which calls the units tensor core, CUDA core and
SFU. Here they are `matrix` (tensor or matrix cores), `vector` (CUDA cores, VALU) and `special`
(exp, rsqrt). `tokens` is batch · query tokens. Each function counts the forward pass of one layer,
or with `backward` its backward pass alone. All counts are integers.
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

    The backward pass costs twice the forward pass: one product for the gradient of the weight, one
    for that of the input. The gradient of the bias is a sum over tokens, T·out.
    """
    products = 2 if backward else 1
    return Flops(products * 2 * tokens * inputs * outputs, tokens * outputs if bias else 0)


def rms_norm(tokens: int, size: int, backward: bool = False) -> Flops:
    """x [tokens, size]: 4·T·D + 2·T vector and T special (rsqrt); backward 11·T·D + 2·T vector."""
    if backward:
        return Flops(vector=11 * tokens * size + 2 * tokens)
    return Flops(vector=4 * tokens * size + 2 * tokens, special=tokens)


def rotary(tokens: int, heads: int, head_dim: int) -> Flops:
    """Rotate [tokens, heads, head_dim]: two products and a sum per value, backward the same."""
    return Flops(vector=3 * tokens * heads * head_dim)


def attention(pairs: int, heads: int, head_dim: int, backward: bool = False) -> Flops:
    """Scores, softmax and values over `pairs`: attended positions summed over query tokens.

    Forward, per pair and head: 4·head_dim matrix; 4 vector (1 for scaling, 3 for the softmax:
    maximum, difference, and sum or division); 1 special (exp). Backward: four matrix products
    instead of two; 5 vector for the softmax (P·dP, its sum, difference, product) and the scaling,
    which the document does not specify.
    """
    if backward:
        return Flops(8 * pairs * heads * head_dim, 5 * pairs * heads)
    return Flops(4 * pairs * heads * head_dim, 4 * pairs * heads, pairs * heads)


def latent_attention(
    pairs: int, heads: int, head_dim: int, rank: int, backward: bool = False
) -> Flops:
    """As `attention`, with scores over head_dim values and sums over the first `rank` of them."""
    whole = attention(pairs, heads, head_dim, backward)
    products = 4 if backward else 2  # that are as many values less
    return whole + Flops(matrix=-products * pairs * heads * (head_dim - rank))


def softmax(rows: int, size: int, backward: bool = False) -> Flops:
    """Softmax of [rows, size]: 3 vector and 1 special per element, as in attention."""
    if backward:
        return Flops(vector=4 * rows * size)
    return Flops(vector=3 * rows * size, special=rows * size)


def swiglu(tokens: int, size: int, backward: bool = False) -> Flops:
    """[tokens, 2·size] → [tokens, size]: 2·T·I vector and T·I special; backward 6·T·I vector.

    As in the document, the sum and the division of silu count, but not the product with `up`.
    The clamps of gpt-oss do not count either.
    """
    if backward:
        return Flops(vector=6 * tokens * size)
    return Flops(vector=2 * tokens * size, special=tokens * size)


def weighted_sum(tokens: int, terms: int, size: int, backward: bool = False) -> Flops:
    """Sum `terms` expert outputs [tokens, size], weighted by the router: 2·T·k·D vector.

    Backward: T·k·D for the gradient of the outputs and 2·T·k·D for that of the weights.
    """
    return Flops(vector=(3 if backward else 2) * tokens * terms * size)


def tiled_matmul_intensity(inner: int, block_m: int, block_n: int) -> float:
    """Return FLOPs per word moved of a tiled product C[M, N] = A[M, K] · B[K, N], K = `inner`.

    2 / (2/K + 1/BLOCK_N + 1/BLOCK_M): C is read and written once, A is read once per column of
    blocks, B once per row of blocks (mfu-formulas, "matmul CI").

    Raises ValueError for sizes below 1.
    """
    if min(inner, block_m, block_n) < 1:
        raise ValueError(f"sizes must be 1 or more, not {inner}, {block_m}, {block_n}")
    return 2 / (2 / inner + 1 / block_n + 1 / block_m)
