"""Causal convolution, gated delta rule and gates, compared with one token after the other."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from model.ops.backend import Backend
from model.ops.cpu.backend import CpuBackend
from model.ops.cpu.bindings import library
from model.ops.forward_batch import ForwardBatch
from model.ops.specs import DeltaRuleGates, DeltaRuleSpec, Norm, NormSpec

CPU = torch.device("cpu")
SPEC = DeltaRuleSpec(key_heads=2, value_heads=4, key_dim=32, value_dim=64, kernel=4)
WIDE = DeltaRuleSpec(key_heads=1, value_heads=1, key_dim=128, value_dim=128, kernel=4)
BACKENDS = [Backend, CpuBackend]


def batch_of(query_lens: list[int], context_lens: list[int], rows: list[int]) -> ForwardBatch:
    """A batch of sequences whose states are in these rows; single tokens first."""
    ends = torch.tensor(query_lens).cumsum(0)
    empty = torch.zeros(0, dtype=torch.int64)
    return ForwardBatch(
        token_ids=empty,
        positions=empty,
        host_query_lens=query_lens,
        host_context_lens=context_lens,
        num_single=query_lens.count(1),
        groups=(),
        logits_rows=empty,
        cu_seqlens_q=F.pad(ends, (1, 0)).int(),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        state_rows=torch.tensor(rows),
    )


@dataclass
class Layer:
    """Random inputs of a recurrent layer, for one sequence of `tokens` tokens, in a dtype."""

    spec: DeltaRuleSpec
    tokens: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        spec, random = self.spec, torch.Generator().manual_seed(self.tokens)
        # The convolution reads only the first channels of what the projection gives.
        self.projected = torch.randn(self.tokens, spec.channels + 32, generator=random)
        self.gates_in = torch.randn(self.tokens, 2 * spec.value_heads, generator=random)
        self.projected, self.gates_in = self.projected.to(self.dtype), self.gates_in.to(self.dtype)
        self.conv = torch.randn(spec.kernel, spec.channels, generator=random)
        self.gates = DeltaRuleGates(
            spec,
            torch.rand(spec.value_heads, generator=random) * 3 - 3,
            torch.randn(spec.value_heads, generator=random),
        )

    def empty_state(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """States that were never written: a sequence must not read them before it writes."""
        conv = torch.full((rows, *self.spec.conv_shape), torch.nan, dtype=self.dtype)
        return conv, torch.full((rows, *self.spec.recurrent_shape), torch.nan)

    batch = staticmethod(batch_of)

    def run(self, ops: Backend, cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The rule's outputs and its last state, in chunks that end at the cuts."""
        conv_state, state = self.empty_state(3)
        out = []
        for start, end in zip([0, *cuts], [*cuts, self.tokens], strict=True):
            batch = batch_of([end - start], [end], [1])
            mixed = ops.causal_conv(self.projected[start:end], self.conv, conv_state, batch)
            gates = self.gates_in[start:end]
            out.append(ops.delta_rule(mixed, gates, self.gates, state, batch))
        return torch.cat(out), state[1]

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `run`, one token after the other, in float64."""
        spec, gates = self.spec, self.gates
        assert gates.decay_log is not None
        assert gates.bias is not None
        x = self.projected[:, : spec.channels].double()
        padded = torch.cat((x.new_zeros(spec.kernel - 1, spec.channels), x))
        weight = self.conv.double()
        windows = (padded[j : j + self.tokens] * weight[j] for j in range(spec.kernel))
        mixed = F.silu(sum(windows, torch.zeros(()))).to(self.dtype).double()  # as it is stored
        keys, each = spec.key_heads * spec.key_dim, spec.value_heads // spec.key_heads
        state = torch.zeros(spec.recurrent_shape, dtype=torch.float64)
        out = []
        for row, gate in zip(mixed, self.gates_in.double(), strict=True):
            query, key = row[: 2 * keys].view(2, spec.key_heads, -1)
            query, key = (
                (each_of / (each_of.square().sum(-1, keepdim=True) + 1e-6).sqrt())
                for each_of in (query, key)
            )
            query, key = (x.repeat_interleave(each, 0) for x in (query, key))
            value = row[2 * keys :].view(spec.value_heads, -1)
            beta, a = torch.sigmoid(gate[: spec.value_heads]), gate[spec.value_heads :]
            decay = torch.exp(-gates.decay_log.double().exp() * F.softplus(a + gates.bias))
            state = state * decay[:, None, None]
            known = torch.einsum("hkv,hk->hv", state, key)
            change = beta[:, None] * (value - known)
            state = state + key[:, :, None] * change[:, None]
            out.append(torch.einsum("hkv,hk->hv", state, query) * spec.key_dim**-0.5)
        return torch.stack(out), state


@pytest.mark.parametrize("spec", [SPEC, WIDE])
@pytest.mark.parametrize("kind", BACKENDS)
def test_a_chunk_gives_what_its_tokens_give_one_after_the_other(
    kind: type[Backend], spec: DeltaRuleSpec
) -> None:
    layer = Layer(spec, 200)
    out, state = layer.run(kind(CPU, torch.float32), [1, 3, 70, 71])
    expected, last = layer.expected()
    torch.testing.assert_close(out, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", BACKENDS)
def test_4000_tokens_in_bfloat16_stay_near_the_rule_in_float64(kind: type[Backend]) -> None:
    layer = Layer(WIDE, 4000, torch.bfloat16)
    out, state = layer.run(kind(CPU, torch.bfloat16), [1000])
    expected, last = layer.expected()
    assert (out.double() - expected).norm() < 4e-3 * expected.norm()  # one rounding to bfloat16
    assert (state.double() - last).norm() < 1e-5 * last.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [SPEC, WIDE])
def test_native_results_do_not_depend_on_where_a_sequence_is_cut(
    spec: DeltaRuleSpec, dtype: torch.dtype
) -> None:
    if library() is None:
        pytest.skip("no native kernels were built here")
    layer = Layer(spec, 60, dtype)
    ops = CpuBackend(CPU, dtype)
    out, state = layer.run(ops, [])
    for cuts in ([1], [16], [59], [2, 17, 40], list(range(1, 60))):
        found, last = layer.run(ops, cuts)
        assert torch.equal(found, out)
        assert torch.equal(last, state)


@pytest.mark.parametrize("kind", BACKENDS)
def test_sequences_of_a_step_use_their_own_states(kind: type[Backend]) -> None:
    check_sequences(kind(CPU, torch.float32))


def check_sequences(ops: Backend) -> None:
    """Two of one token, one that starts and one that continues, in rows of any order."""
    lengths, starts, rows = [1, 1, 7, 3], [0, 9, 0, 5], [4, 0, 3, 1]
    layers = [Layer(SPEC, start + n) for start, n in zip(starts, lengths, strict=True)]
    shared = layers[0]
    for layer in layers:
        layer.conv, layer.gates = shared.conv, shared.gates
    conv_state, state = shared.empty_state(6)
    for layer, start, row in zip(layers, starts, rows, strict=True):
        if start:
            batch = batch_of([start], [start], [row])
            mixed = ops.causal_conv(layer.projected[:start], layer.conv, conv_state, batch)
            ops.delta_rule(mixed, layer.gates_in[:start], layer.gates, state, batch)
    context = [start + n for start, n in zip(starts, lengths, strict=True)]
    batch = batch_of(lengths, context, rows)
    new = [(layer, slice(start, None)) for layer, start in zip(layers, starts, strict=True)]
    mixed = ops.causal_conv(
        torch.cat([layer.projected[own] for layer, own in new]), shared.conv, conv_state, batch
    )
    gates = torch.cat([layer.gates_in[own] for layer, own in new])
    out = ops.delta_rule(mixed, gates, shared.gates, state, batch)
    for i, (found, (layer, own)) in enumerate(zip(out.split(lengths), new, strict=True)):
        expected, last = layer.expected()
        torch.testing.assert_close(found, expected[own].float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(state[rows[i]], last.float(), rtol=1e-4, atol=1e-5)
        tokens = layer.projected[-3:, : SPEC.channels]
        assert torch.equal(conv_state[rows[i], -len(tokens) :], tokens)
    assert state[[2, 5]].isnan().all()  # rows of no sequence
    assert conv_state[[2, 5]].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_gates_equal_those_of_torch(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 64, generator=random).to(dtype)
    gate = torch.randn(5, 200, generator=random).to(dtype)
    norm = Norm(64, NormSpec(1e-6), weight=torch.rand(64, generator=random))
    plain, native = Backend(CPU, dtype), CpuBackend(CPU, dtype)
    slack = 1e-5 if dtype == torch.float32 else 1e-2
    expected = plain.gated_norm(x, gate[:, 8:], norm)
    torch.testing.assert_close(
        native.gated_norm(x, gate[:, 8:], norm), expected, rtol=slack, atol=slack
    )
    flat, own = x.flatten(1), gate[:, :192].contiguous()
    expected = plain.output_gate(flat, own)
    torch.testing.assert_close(native.output_gate(flat, own), expected, rtol=slack, atol=slack)
