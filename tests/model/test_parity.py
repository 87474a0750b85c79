"""The decoder and the engine give the same results as transformers, in float32."""

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import Engine, EngineConfig, Request, SamplingParams
from model import ModelConfig, Transformer, load_config, loader
from model.layers.delta_rule import DeltaRule
from model.ops.backend import choose_backend
from model.ops.forward_batch import ForwardBatch, GroupTables
from model.ops.specs import LayerState
from tests.checkpoints import FAMILIES, Peer, edit_config, write_checkpoint, write_mxfp4_pair

CPU = torch.device("cpu")


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, 512), k=length)


def logits_of(
    folder: Path,
    ids: list[int],
    change: Callable[[ModelConfig], ModelConfig] = lambda c: c,
    dtype: torch.dtype = torch.float32,
    rows: list[int] | None = None,
    watch: Callable[[Transformer], None] = lambda _: None,
) -> torch.Tensor:
    """Logits of one sequence in one chunk, with blocks in a scrambled order.

    change: of the config that the checkpoint has; rows: of these tokens, or of all of them; watch:
    is called with the model before it runs.
    """
    backend = choose_backend(CPU, dtype)
    config = change(load_config(folder)).held(backend)
    model = Transformer(config)
    loader.load(model, folder, backend)
    model.prepare_rope(config.max_positions, CPU)
    watch(model)
    count, size = len(ids), 16
    table = torch.randperm(count // size + 1, generator=torch.Generator().manual_seed(0)) + 1
    positions = torch.arange(count)
    slot_mapping = table[positions // size] * size + positions % size
    windows = list(dict.fromkeys(layer.window for layer in config.layers))
    heads = [config.heads(layer) for layer in config.layers]
    shape = (config.kv_vectors, len(table) + 1, size)
    sources = [
        i if layer.kv_source is None else layer.kv_source for i, layer in enumerate(config.layers)
    ]
    with torch.inference_mode():
        return model(
            backend,
            ForwardBatch(
                torch.tensor(ids),
                positions + config.rope.first_row(count),
                [count],
                [count],
                0,
                tuple(GroupTables(table[None].int(), slot_mapping) for _ in windows),
                positions if rows is None else torch.tensor(rows, dtype=torch.int64),
                torch.tensor([0, count], dtype=torch.int32),
                torch.tensor([count], dtype=torch.int32),
                torch.tensor([1]),
            ),
            [torch.zeros(*shape, own.num_kv_heads, own.head_dim, dtype=dtype) for own in heads],
            [(windows.index(config.layers[i].window), i) for i in sources],
            states=[
                LayerState(
                    torch.full((3, *config.delta_rule.conv_shape), torch.nan),
                    torch.full((3, *config.delta_rule.recurrent_shape), torch.nan),
                )
                for _ in config.recurrent_layers
                if config.delta_rule is not None
            ],
        )


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual - expected).norm() / expected.norm()
    assert error < 1e-4, f"relative error {error:.2e}"
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_transformers_beyond_window_and_original_context(
    name: str, checkpoint: Callable[[str], Path], peer: Callable[[str], Peer]
) -> None:
    ids = prompt(200)
    assert_close(logits_of(checkpoint(name), ids), peer(name).logits(ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_last_layer_computes_what_the_needed_logits_depend_on(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    ids, found = prompt(40), []

    def watch(model: Transformer) -> None:
        last = model.layers[-1]

        def counted(ops: Any, x: torch.Tensor, delta: torch.Tensor, run: Any = last.mlp) -> Any:
            found.append(len(x))
            return run(ops, x, delta)

        last.mlp = counted  # type: ignore[assignment]

    expected = logits_of(checkpoint(name), ids)
    assert_close(logits_of(checkpoint(name), ids, rows=[7, 39], watch=watch), expected[[7, 39]])
    assert found == [2]

    def only_write(model: Transformer) -> None:
        watch(model)
        if not isinstance(model.layers[-1].attention, DeltaRule):
            del model.layers[-1].attention.out

    none = logits_of(checkpoint(name), ids, rows=[], watch=only_write)
    assert none.shape == (0, expected.shape[1])
    assert found == [2]


@pytest.mark.parametrize("length", [40, 64, 65])
def test_longrope_uses_the_short_factors_up_to_the_original_context(
    length: int, checkpoint: Callable[[str], Path], peer: Callable[[str], Peer]
) -> None:
    name, ids = "phi3-longrope", prompt(length)
    assert_close(logits_of(checkpoint(name), ids), peer(name).logits(ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_64_greedy_tokens_equal_transformers(
    name: str, checkpoint: Callable[[str], Path], peer: Callable[[str], Peer]
) -> None:
    # 3 is shorter than every window; 50 exceeds window and original context while decoding.
    prompts = [prompt(3, 1), prompt(50, 2), prompt(150, 3)]
    with Engine(checkpoint(name), EngineConfig(dtype="float32", kv_memory=32 << 20)) as engine:
        params = SamplingParams(max_new_tokens=64, ignore_eos=True)
        done = {
            c.request_id: c.token_ids
            for c in engine.generate(Request(p, params, i) for i, p in enumerate(prompts))
        }
    for i, ids in enumerate(prompts):
        assert len(done[i]) == 64
        assert peer(name).is_greedy(ids, done[i])


def test_mxfp4_experts_equal_their_dequantized_weights(tmp_path: Path) -> None:
    write_mxfp4_pair(tmp_path / "packed", tmp_path / "dense")
    ids = prompt(120)
    peer = Peer(tmp_path / "dense")
    assert_close(logits_of(tmp_path / "packed", ids), peer.logits(ids))
    with Engine(tmp_path / "packed", EngineConfig(dtype="float32", kv_memory=32 << 20)) as engine:
        request = Request(ids, SamplingParams(max_new_tokens=64, ignore_eos=True))
        (done,) = engine.generate([request])
    assert len(done.token_ids) == 64
    assert peer.is_greedy(ids, done.token_ids)


def test_older_rope_keys_give_the_same_config(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    write_checkpoint(tmp_path, "llama-llama3-rope")
    edit_config(
        tmp_path,
        rope_parameters=None,
        rope_theta=500_000.0,
        rope_scaling={
            "type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    )
    newer = load_config(checkpoint("llama-llama3-rope"))
    assert load_config(tmp_path) == newer


def test_a_sharded_checkpoint_loads_like_a_single_file(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    write_checkpoint(tmp_path, "gpt_oss", max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ids = prompt(40)
    torch.testing.assert_close(
        logits_of(tmp_path, ids), logits_of(checkpoint("gpt_oss"), ids), rtol=0, atol=0
    )


def test_norm_weights_may_be_centered_on_zero(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """As Gemma stores them: the same model, whose stored norms are less by one."""
    folder, ids = checkpoint("qwen3"), prompt(40)
    shutil.copytree(folder, tmp_path / "centered")
    path = tmp_path / "centered" / "model.safetensors"
    tensors = load_file(path)
    norms = [name for name in tensors if "norm" in name]
    assert len(norms) == 4 * len(load_config(folder).layers) + 1
    for name in norms:
        tensors[name] = tensors[name] - 1
    save_file(tensors, path)

    def centered(config: ModelConfig) -> ModelConfig:
        return replace(config, norm=replace(config.norm, weight_offset=1.0))

    torch.testing.assert_close(logits_of(path.parent, ids, centered), logits_of(folder, ids))


def test_layers_can_have_rotary_embeddings_of_their_own(
    checkpoint: Callable[[str], Path],
) -> None:
    """With two bases in turn, as Gemma 3 has them for its local and its global layers."""
    folder, ids = checkpoint("qwen2"), prompt(40)
    own = replace(load_config(folder).rope, theta=500.0)

    def own_rope_of(which: Callable[[int], bool]) -> Callable[[ModelConfig], ModelConfig]:
        def change(config: ModelConfig) -> ModelConfig:
            layers = enumerate(config.layers)
            changed = (replace(a, rope=own) if which(i) else a for i, a in layers)
            return replace(config, layers=tuple(changed))

        return change

    every = logits_of(folder, ids, own_rope_of(lambda layer: True))
    shared = logits_of(folder, ids, lambda config: replace(config, rope=own))
    assert torch.equal(every, shared)
    some = logits_of(folder, ids, own_rope_of(lambda layer: layer % 2 == 1))
    plain = logits_of(folder, ids)
    assert not torch.allclose(some, every, rtol=1e-3)
    assert not torch.allclose(some, plain, rtol=1e-3)
