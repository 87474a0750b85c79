"""Launches of attention without a GPU: their grids, and code for head sizes of no known model."""

from typing import Any

import pytest
import torch

from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.specs import AttentionSpec
from tests.model.test_triton import ARCHITECTURES

pytest.importorskip("triton")
from triton.runtime.jit import JITFunction

from model.ops.triton.backend import TritonBackend
from model.ops.triton.tiles import TILES, Target
from tests.model.compiled_kernels import compiled
from tests.model.triton_compiler import launch_of

_MOST_PROGRAMS = (2**31 - 1, 65_535, 65_535)  # on each axis of a grid, on NVIDIA's GPUs


def attend(
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    singles: int,
    chunk: int,
    dim: int,
    latent_dim: int | None = None,
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The launches (kernel, arguments, named arguments) of a step of single tokens and a chunk."""
    found = []

    def record(kernel: Any, *args: Any, warmup: bool, **kw: Any) -> None:
        found.append((kernel, args, kw))

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    monkeypatch.setattr(JITFunction, "run", record)
    target = Target(architecture, 132, TILES[architecture])
    ops = TritonBackend(torch.device("meta"), torch.bfloat16, target)
    sequences = singles + bool(chunk)
    ids = empty(singles + chunk, dtype=torch.int64)
    starts = empty(sequences + 1, dtype=torch.int32)
    batch = ForwardBatch(ids, ids, [], [], singles, (), ids, starts, starts[:-1])
    table = GroupTables(empty(sequences, 512, dtype=torch.int32), ids)
    query, kv = empty(singles + chunk, 16, dim), empty(2, 60_000, 16, 2, dim)
    if latent_dim is not None:
        kv = empty(1, 60_000, 16, 1, dim)
    spec = AttentionSpec(dim**-0.5, None, latent_dim=latent_dim)
    ops.attention(query, kv, batch, table, spec, empty(16) if latent_dim is None else None)
    return found


def test_grids_stay_within_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 70,000 single tokens and of more than 65,535 tiles of a chunk."""
    launches = attend(monkeypatch, "sm_90", 70_000, 1_200_000, 64)
    programs = []
    for _, _, named in launches:
        grid = named["grid"]
        assert all(size <= most for size, most in zip(grid, _MOST_PROGRAMS, strict=False))
        programs.append(grid[0])
    assert min(programs) > 2 * 65_535  # for each of two KV heads


def test_single_tokens_beside_chunks_are_computed_as_single_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decode, prefill = attend(monkeypatch, "sm_90", 3, 100, 64)
    assert decode[0].__name__ == "decode_attention"
    assert decode[2]["grid"] == ((3 + 3 * 63) * 2,)
    assert prefill[0].__name__ == "prefill_attention"
    queries = 128 // 8  # in a tile: 128 rows, 8 query heads for each KV head
    assert prefill[2]["grid"] == ((100 // queries + 1) * 2,)


_SOME = ("sm_80", "sm_90", "gfx942", "gfx1201")


@pytest.mark.parametrize(
    ("dim", "latent_dim", "architecture"),
    [
        *((256, None, each) for each in ARCHITECTURES),
        *((512, None, each) for each in _SOME),  # Gemma 4
        *((576, 512, each) for each in _SOME),  # DeepSeek
    ],
)
def test_large_heads_and_latents_compile_and_fit(
    dim: int, latent_dim: int | None, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches = attend(monkeypatch, architecture, 8, 100, dim, latent_dim)
    monkeypatch.undo()
    found = []
    for kernel, args, named in launches:
        options = {name: value for name, value in named.items() if name != "grid"}
        found.append(launch_of(kernel, args, options))
    compiled(found, architecture, wide_heads=True)
