"""Memory is checked before it is used, and a run continues after running out of it."""

import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import Engine, EngineConfig, EngineError
from engine import engine as module
from engine import memory_plan as memory
from engine.execution.kv_tensors import KvLayout
from engine.memory_plan import MemoryPlan, format_bytes, is_out_of_memory
from engine.resolve import resolve
from model import load_config
from model.cost.known_models import named_config
from model.cost.operations import parameter_bytes
from model.formats import FP8 as FP8_FORMAT
from model.ops.backend import choose_backend
from tests.engine.test_engine import load
from tests.quantized_checkpoints import fp8_blocks, is_linear, mxfp4, write_quantized

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]


def needs(**changes: Any) -> MemoryPlan:
    config = replace(named_config("llama-3-8b"), **changes)
    return MemoryPlan.of(resolve(EngineConfig(device="cpu", dtype="bfloat16"), config))


def test_the_plan_follows_from_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "library", object)
    llama = needs()
    rotary = 4 * 8192 * 128
    assert llama.weights == 8_030_261_248 * 2 + rotary  # the parameter count of the model card
    stream = 2 * 4 * 4096  # float32, before and after an addition
    assert llama.activations == 512 * (stream + 2 * (2 * 4096 + 4 * 14_336))
    assert llama.logits == 64 * 128_256 * (4 + 48)
    tied = needs(tie_word_embeddings=True)
    assert tied.weights == llama.weights  # the embedding is held twice: as it is, and packed
    monkeypatch.setattr(memory, "library", lambda: None)  # torch's head is float32
    assert needs().weights == llama.weights + 2 * 128_256 * 4096
    assert needs(tie_word_embeddings=True).weights == needs().weights


def test_a_head_that_is_quantized_is_counted_beside_the_embedding_that_it_copies() -> None:
    config = replace(named_config("llama-3-8b"), tie_word_embeddings=True).quantized("fp8")
    untied = replace(config, tie_word_embeddings=False)
    assert parameter_bytes(config, "bfloat16") == parameter_bytes(untied, "bfloat16")
    assert (
        needs(tie_word_embeddings=True, head_format=FP8_FORMAT).weights
        == needs(head_format=FP8_FORMAT).weights
    )


def test_recurrent_layers_have_no_place_in_kv_blocks() -> None:
    config = named_config("qwen3.5-9b")  # one layer in four has attention, with 4 heads of 256
    layout = KvLayout.of(config, 2, torch.bfloat16)
    assert [group.layers for group in layout.groups] == [tuple(range(3, 32, 4))]
    assert layout.block_bytes(16) == 8 * 2 * 16 * 2 * 256 * 2
    assert [layout.layer_caches[layer] for layer in range(3, 32, 4)] == [(0, i) for i in range(8)]


FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
MXFP4 = {
    "quant_method": "compressed-tensors",
    "format": "mxfp4-pack-quantized",
    "config_groups": {
        "a": {
            "targets": ["re:.*_proj$"],
            "weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32},
        }
    },
}


def notices(checkpoint: Path, dtype: str, quantize: str | None = None) -> list[str]:
    found: list[str] = []
    config = EngineConfig(device="cpu", dtype=dtype, kv_memory=8 << 20, quantize=quantize)
    engine = Engine(checkpoint, config, notice=found.append)
    engine.warm_up()
    engine.finish()
    return found


def test_weights_without_a_kernel_are_named_with_the_memory_that_they_take(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    folder = tmp_path / "fp8"
    write_quantized(
        checkpoint("qwen3_moe"), folder, tmp_path / "dense", FP8,
        lambda module: fp8_blocks(32, 32) if is_linear(module) else None,
    )  # fmt: skip
    config = load_config(folder)
    (notice,) = notices(folder, "float32")
    stored = (folder / "model.safetensors").stat().st_size
    assert "the weights in FP8 are dequantized to float32" in notice
    held = config.held(choose_backend(torch.device("cpu"), torch.float32))
    needed = format_bytes(parameter_bytes(held, "float32"))
    assert f"take {needed} instead of {format_bytes(stored)};" in notice
    assert "activations stay in float32 instead of FP8 (dynamic scales)" in notice


def test_weights_with_a_kernel_need_no_notice(
    tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    folder = tmp_path / "mxfp4"
    write_quantized(
        checkpoint("qwen3_moe"), folder, tmp_path / "dense", MXFP4,
        lambda module: mxfp4 if is_linear(module) else None,
    )  # fmt: skip
    (notice,) = notices(folder, "float32")
    assert "the weights in mxfp4 are dequantized to float32" in notice
    if memory.library() is not None:
        assert notices(folder, "bfloat16") == []
        (notice,) = notices(folder, "bfloat16", "int4")
        assert notice == "quantizing to int4 changes only the head: all other weights stay mxfp4"
        assert notices(tmp_path / "dense", "bfloat16", "int4") == []
        held = resolve(EngineConfig(device="cpu", dtype="bfloat16"), load_config(folder)).model
        dense = load_config(tmp_path / "dense")
        whole = parameter_bytes(dense, "bfloat16")
        linears = whole - parameter_bytes(replace(dense, layers=()), "bfloat16")
        assert parameter_bytes(held, "bfloat16") < whole - linears // 2


def test_what_steps_allocated_replaces_estimates() -> None:
    """Captured steps, of every row and a thousand tokens of chunks, have memory of their own."""
    given = EngineConfig(device="cpu", max_batch_size=64, max_batch_tokens=4096)
    settings = resolve(given, named_config("llama-3-8b"))
    plan = MemoryPlan.of(settings)
    found = plan.measured(5000, 700, settings)
    assert found.activations == 5000 + plan.activations * (64 + 1024) // 4096
    assert found == replace(plan, activations=found.activations, logits=700)


def test_the_end_of_a_captured_step_is_measured_with_every_row(
    checkpoint: Callable[[str], Path],
) -> None:
    """What it allocates may only depend on the number of rows, as it does in captured steps."""
    with Engine(checkpoint("qwen3"), EngineConfig(dtype="float32", kv_memory=8 << 20)) as engine:
        runner, given = engine.runner, list[Any]()
        sample = runner.backend.sample_rows

        def noted(*arguments: Any) -> torch.Tensor:
            given.extend(argument.shape for argument in arguments[:2])
            assert arguments[4] is not None  # tables: not only the most likely tokens
            return sample(*arguments)

        runner.backend.sample_rows = noted  # type: ignore[method-assign, assignment]
        runner.run_peak_end(40)
        assert given == [(40, engine.model_config.vocab_size), (40,)]


def test_planned_weights_are_as_large_as_the_loaded_tensors(
    checkpoint: Callable[[str], Path],
) -> None:
    for name in ("gpt_oss", "qwen2", "qwen3_moe"):
        engine = Engine(checkpoint(name), EngineConfig(dtype="float32", kv_memory=8 << 20))
        with engine:
            model = engine.runner.model
            found: dict[int, int] = {}
            todo: list[Any] = [model]
            while todo:
                item = todo.pop()
                if isinstance(item, torch.Tensor):
                    found[item.data_ptr()] = item.nbytes
                elif isinstance(item, list | tuple):
                    todo += item
                elif type(item).__module__.startswith("model.") and hasattr(item, "__dict__"):
                    todo += vars(item).values()
        counted = MemoryPlan.of(engine.settings).weights
        assert counted == pytest.approx(sum(found.values()), rel=0.02)


@pytest.mark.parametrize(
    ("available", "settings", "words"),
    [
        (300 << 10, {}, r"weights \S+ \+ KV cache at least .* = .* available; use a smaller model"),
        (40 << 20, {"kv_memory": 1 << 30}, r"KV cache 1.00GiB .*; lower kv_memory to \S+ or"),
        (40 << 20, {"max_batch_tokens": 1 << 20}, r"activations \S+GiB .*max_batch_tokens"),
        (40 << 20, {"max_batch_size": 10**20}, r"block tables \S+GiB .*max_batch_size"),
        (40 << 20, {"block_size": 10**8}, r"available; lower block_size"),
    ],
)
def test_too_little_memory_fails_with_the_arithmetic_before_anything_is_loaded(
    available: int, settings: dict[str, Any], words: str,
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    engine = Engine(checkpoint("qwen2"), EngineConfig(dtype="float32", **settings))
    monkeypatch.setattr(module, "available_bytes", lambda device: available)
    monkeypatch.setattr(engine.runner, "load", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(EngineError, match=words):
        engine.warm_up()


def test_the_advised_kv_memory_is_enough(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda device: 40 << 20)
    engine = Engine(checkpoint("qwen2"), EngineConfig(dtype="float32", kv_memory=1 << 30))
    with pytest.raises(EngineError, match="lower kv_memory") as raised:
        engine.warm_up()
    advised = str(raised.value).split("kv_memory to ")[1].split("MiB")[0]
    with Engine(
        checkpoint("qwen2"), EngineConfig(dtype="float32", kv_memory=int(float(advised) * 2**20))
    ) as engine:
        assert engine.stats.kv_blocks > 1


def test_the_kv_pool_leaves_room_for_activations_and_logits(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda device: 40 << 20)
    with Engine(checkpoint("qwen2"), EngineConfig(dtype="float32")) as engine:
        need = MemoryPlan.of(engine.settings)
        left = (40 << 20) - need.activations - need.logits - need.rows
        assert 0 < engine.stats.kv_bytes <= 0.4 * left


def test_a_ulimit_reduces_the_available_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert memory.available_bytes(CPU) > 0
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + (1 << 20)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limit, limit))
    assert memory.available_bytes(CPU) <= 2 << 20


_GROWTH = """
import resource, sys
from pathlib import Path
from engine import Engine, EngineConfig
from engine.memory_plan import MemoryPlan

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

grown = []
for count in (64, 500_000):
    before = resident()
    config = EngineConfig(kv_memory=8 << 20, max_batch_size=count)
    with Engine(sys.argv[1], config) as engine:
        grown.append(resident() - before)
print(grown[1] - grown[0], MemoryPlan.of(engine.settings).rows)
"""


def test_the_plan_includes_the_state_of_each_request(checkpoint: Callable[[str], Path]) -> None:
    """Planned bytes (block tables, parameters, lists) are near the growth of a new process."""
    command = [sys.executable, "-c", _GROWTH, str(checkpoint("gpt_oss-wide"))]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    grown, planned = map(int, run.stdout.split())
    assert 0.3 * planned < grown < planned


def test_running_out_of_memory_while_loading_is_an_engine_error(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(checkpoint("qwen2"), EngineConfig(dtype="float32", kv_memory=8 << 20))

    def allocate(*_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(engine.runner, "allocate", allocate)
    with pytest.raises(EngineError, match="out of memory while the model was loaded"):
        engine.warm_up()


def test_every_out_of_memory_error_is_recognized() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not is_out_of_memory(RuntimeError("the device is gone"))
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


def test_bytes_are_formatted_rounded_down() -> None:
    assert [format_bytes(n) for n in (17, 2048, 3 << 20, (1 << 31) - 1)] == [
        "17B", "2.00KiB", "3.00MiB", "1.99GiB",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ],
)
@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_step_that_runs_out_of_memory_is_repeated_in_parts(
    error: Exception,
    lookahead: int,
    checkpoint: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = load()
    notices: list[str] = []
    with Engine(
        checkpoint("gpt_oss"),
        EngineConfig(dtype="float32", kv_memory=32 << 20, speculation=not lookahead),
        notice=notices.append,
    ) as engine:
        expected = {c.request_id: c.token_ids for c in engine.generate(requests)}
        engine.steps.lookahead = lookahead
        steps, launch = 0, engine.runner.launch

        def failing(step: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps in (3, 20, 21):
                for cache in engine.runner.kv_caches:  # KV of the failed step must not be read
                    cache[:, 1:] = float("nan")
                raise error
            return launch(step)

        monkeypatch.setattr(engine.runner, "launch", failing)
        assert {c.request_id: c.token_ids for c in engine.generate(requests)} == expected
    assert engine.stats.back_offs == 3
    assert len(notices) == 3
    assert "continuing with at most 5 requests and" in notices[0]


@pytest.mark.parametrize(
    ("line", "folder", "names"),
    [
        ("0::/job/step", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "9:memory:/job/step",
            "memory/",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_memory_that_a_cgroup_leaves_includes_cached_files(
    tmp_path: Path, line: str, folder: str, names: tuple[str, str, str]
) -> None:
    limit, used, cached = names
    group = tmp_path / "sys/fs/cgroup" / folder / "job"
    (group / "step").mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"{line}\n")
    (group / limit).write_text("1000\n")  # of a group around that of the process
    (group / used).write_text("700\n")
    (group / "memory.stat").write_text(f"anon 100\n{cached} 500\n")
    (group / "step" / limit).write_text("max\n")
    (group / "step" / used).write_text("650\n")
    assert memory._cgroup_available(tmp_path) == [800]
    (group / "memory.stat").unlink()
    assert memory._cgroup_available(tmp_path) == [300]
