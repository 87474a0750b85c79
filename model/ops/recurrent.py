"""The operations of recurrent layers in plain torch: causal convolution and gated delta rule.

The rule (Yang et al. 2024, "Gated Delta Networks") is computed for each value head, with a value v
and its key head's query q and key k, both divided by their lengths. The state S
[key_dim, value_dim] decays by a factor α, and a part β of what it gives for the key is replaced by
the value:

    S ← α·S + β·k (v - α·kᵀS)ᵀ        α = exp(-A · softplus(a + bias)), β = sigmoid(b)
    output = Sᵀ·q / √key_dim
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model.ops.forward_batch import ForwardBatch
from model.ops.specs import DeltaRuleGates, DeltaRuleSpec, Norm

_CHUNK = 64  # tokens that are computed at once
_EPS = 1e-6  # added to the squares of the lengths of queries and keys


class RecurrentOps:
    """The part of `Backend` that recurrent layers use."""

    def causal_conv(
        self, x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, batch: ForwardBatch
    ) -> torch.Tensor:
        """SiLU of the causal convolution of each sequence's tokens, each channel by itself.

        x [tokens, at least channels], of which the first channels count; weight float32
        [kernel, channels], the weight of the newest token last; state [rows, kernel - 1, channels]:
        the tokens before, which is replaced by the last ones → [tokens, channels].
        """
        kernel, channels = weight.shape
        out = x.new_empty(len(x), channels)
        for sequence in _sequences(batch):
            own = x[sequence.tokens, :channels]
            before = state[sequence.row]
            inputs = torch.cat((torch.zeros_like(before) if sequence.is_new else before, own))
            windows = inputs.float().unfold(0, kernel, 1)  # [tokens, channels, kernel]
            out[sequence.tokens] = F.silu((windows * weight.T).sum(-1)).to(x.dtype)
            state[sequence.row] = inputs[len(own) :]
        return out

    def delta_rule(
        self,
        mixed: torch.Tensor,
        gates: torch.Tensor,
        parameters: DeltaRuleGates,
        state: torch.Tensor,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """The gated delta rule over each sequence's new tokens.

        mixed [tokens, channels]: queries, keys and values; gates [tokens, 2 · value heads]: b of
        every value head, then a; state float32 [rows, value heads, key_dim, value_dim], replaced by
        that after the last token → [tokens, value heads, value_dim].
        """
        spec = parameters.spec
        out = mixed.new_empty(len(mixed), spec.value_heads, spec.value_dim)
        for sequence in _sequences(batch):
            inputs = rule_inputs(mixed[sequence.tokens], gates[sequence.tokens], parameters)
            own = state[sequence.row].masked_fill(torch.tensor(sequence.is_new), 0.0)
            results = []
            for first in range(0, inputs.query.shape[1], _CHUNK):
                part = RuleInputs(*(each[:, first : first + _CHUNK] for each in inputs))
                result, own = chunk_of_rule(part, own)
                results.append(result)
            out[sequence.tokens] = torch.cat(results, dim=1).transpose(0, 1).to(mixed.dtype)
            state[sequence.row] = own
        return out

    def gated_norm(self, x: torch.Tensor, gate: torch.Tensor, norm: Norm) -> torch.Tensor:
        """x [tokens, heads, size], gate [tokens, heads · size] → norm of each head · SiLU(gate).

        The result is [tokens, heads · size].
        """
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + norm.eps) * norm.weight
        return (normed.flatten(1) * F.silu(gate.float())).to(x.dtype)

    def output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """x and gate [tokens, size] → x · sigmoid(gate)."""
        return x * torch.sigmoid(gate)


class RuleInputs(NamedTuple):
    """Inputs of the rule in float32, by value head."""

    query: torch.Tensor  # [value heads, tokens, key_dim], divided by its length and √key_dim
    key: torch.Tensor  # [value heads, tokens, key_dim], divided by its length
    value: torch.Tensor  # [value heads, tokens, value_dim]
    decay_log: torch.Tensor  # [value heads, tokens]: ln α
    beta: torch.Tensor  # [value heads, tokens]


def rule_inputs(mixed: torch.Tensor, gates: torch.Tensor, parameters: DeltaRuleGates) -> RuleInputs:
    """The inputs of the rule from the arguments of `RecurrentOps.delta_rule`."""
    spec = parameters.spec
    assert parameters.decay_log is not None
    assert parameters.bias is not None
    query, key, value = split_channels(mixed, spec)
    each = spec.value_heads // spec.key_heads
    query, key = (
        (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + _EPS)).repeat_interleave(each, dim=0)
        for x in (query, key)
    )
    b, a = gates.float().T.chunk(2)
    softplus = F.softplus(a + parameters.bias.unsqueeze(1))
    decay_log = -parameters.decay_log.exp().unsqueeze(1) * softplus
    return RuleInputs(query * spec.key_dim**-0.5, key, value, decay_log, torch.sigmoid(b))


def split_channels(
    mixed: torch.Tensor, spec: DeltaRuleSpec
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """mixed [tokens, channels] → queries, keys and values float32 [heads, tokens, dim]."""
    keys, values = spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim
    query, key, value = mixed.float().split((keys, keys, values), dim=-1)
    heads = (spec.key_heads, spec.key_heads, spec.value_heads)
    query, key, value = (
        x.unflatten(-1, (count, -1)).transpose(0, 1)
        for x, count in zip((query, key, value), heads, strict=True)
    )
    return query, key, value


def chunk_of_rule(inputs: RuleInputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule over a few tokens at once: their outputs, and the state after them.

    state [value heads, key_dim, value_dim] → outputs [value heads, tokens, value_dim] and the new
    state. What each token writes, β·(v - α·kᵀS), depends on what the ones before it wrote: a
    triangular system of equations ("UT transform", Yang et al. 2024, section 3.2).
    """
    query, key, value, decay_log, beta = inputs
    total = decay_log.cumsum(1)  # ln of the decay from the start of the chunk to each token
    since = (total.unsqueeze(2) - total.unsqueeze(1)).tril()  # from each token to each later one
    decay = since.exp().tril()
    keys = beta.unsqueeze(2) * (key @ key.transpose(1, 2)) * decay
    before = total.exp().unsqueeze(2)
    wanted = beta.unsqueeze(2) * (value - before * (key @ state))
    written = torch.linalg.solve_triangular(keys, wanted, upper=False, unitriangular=True)
    out = before * (query @ state) + (query @ key.transpose(1, 2) * decay) @ written
    after = (total[:, -1:] - total).exp().unsqueeze(2)
    state = total[:, -1:, None].exp() * state + (after * key).transpose(1, 2) @ written
    return out, state


class _Sequence(NamedTuple):
    tokens: slice
    row: int
    is_new: bool


def _sequences(batch: ForwardBatch) -> Iterator[_Sequence]:
    """The sequences of a batch: their tokens and the rows of their states."""
    if len(batch.host_context_lens) != len(batch.host_query_lens):
        raise RuntimeError("torch's recurrence needs lengths that a captured step does not have")
    assert batch.state_rows is not None
    first = 0
    lengths = zip(batch.host_query_lens, batch.host_context_lens, strict=True)
    for row, (count, context) in zip(batch.state_rows.tolist(), lengths, strict=True):
        yield _Sequence(slice(first, first + count), row, count == context)
        first += count
