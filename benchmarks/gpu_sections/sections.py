"""The tables of sections: what runs in which process, in which order, for how long at most."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu_sections.measure import Limits, Row

Run = Callable[["Limits"], Iterator["Row"]]


@dataclass(frozen=True)
class Section:
    """One part of the benchmark, run in a separate process.

    `run` yields result rows, given the GPU's measured limits. A timed section has the GPU to
    itself; sections that are not timed mostly compile, so they run concurrently. `operations` are
    the methods of Backend that a check is about: if it fails, it is repeated with variants of them.
    """

    run: Run
    limit_s: float
    description: str
    timed: bool = True
    operations: tuple[str, ...] = ()


def _of(module: str, function: str, *arguments: Any) -> Run:
    """Return a section that calls a function of a module, which is imported only then."""

    def run(limits: "Limits") -> "Iterator[Row]":
        found = getattr(import_module(f"benchmarks.gpu_sections.{module}"), function)
        yield from found(*arguments, limits)

    return run


def _check(function: str, module: str = "checks", *arguments: Any) -> Run:
    """Return a section that makes all comparisons of a check, even if some of them fail."""

    def run(limits: "Limits") -> "Iterator[Row]":
        from benchmarks.gpu_sections.inputs import COMPUTES
        from benchmarks.gpu_sections.measure import Row, note
        from benchmarks.gpu_sections.model_checks import CheckError

        check = getattr(import_module(f"benchmarks.gpu_sections.{module}"), function)
        found = list(check(*arguments))
        problems = [problem for problem in found if problem is not None]
        title = function.replace("_", " of ", 1)
        if COMPUTES:
            yield Row(title, len(found) - len(problems), f"of {len(found)} correct")
        else:
            yield note(f"{title}: {len(found)} comparisons ran; results are not computed here")
        if problems:
            raise CheckError("; ".join(problems))

    return run


def _load(
    model: str,
    title: str,
    load: tuple[Any, ...],
    max_s: float,
    batch_size: int = 256,
    published: str = "",
    running: bool = False,
) -> Run:
    """Return a section that times a load: the name and the arguments of a function of `loads`.

    running: the load is so long that only a part of it is run, as it is after a long time.
    """

    def run(limits: "Limits") -> "Iterator[Row]":
        from benchmarks.gpu_sections import loads

        function, *arguments = load
        requests = getattr(loads, function)(*arguments)
        if running:
            requests = loads.in_progress(requests, batch_size)
        yield from loads.time_load(model, title, requests, limits, max_s, batch_size, published)

    return run


_PARITY = (
    "embed", "logits", "linear", "add_rms_norm", "norm_qkv", "norm_mlp", "rotate_and_write",
    "attention", "activate", "route", "experts", "norm_experts", "pack_experts", "pack_mxfp4",
    "sample_rows", "gated", "scaled_sum", "add_gated", "head_linear", "latent_query",
)  # fmt: skip
# Of the other families, in processes of their own: most of their time is compiling.
PARITY_PARTS = 6
_TRT = "TensorRT-LLM on an H200"
_COURSE = "39,120 (gpt-oss-team01, bf16, eight MI250 dies)"

# Stands alone: is everything correct, and about how fast is it? Ordered by importance. The limits
# of all timed sections plus the longest limit of the others are the budget.
QUICK_BUDGET_S = 90.0
QUICK: dict[str, Section] = {
    "limits": Section(
        _of("measure", "measured_limits"), 10, "copy bandwidth and bf16 matrix product"
    ),
    "check-norms": Section(
        _check("check_norms"), 30, "norms and SwiGLU against the reference", False,
        ("embed", "logits", "add_rms_norm", "activate", "rotate_and_write"),
    ),
    "check-attention": Section(
        _check("check_attention"), 30, "attention, rotary and KV", False,
        ("attention",),
    ),
    "check-experts": Section(
        _check("check_experts"), 30, "router and experts", False,
        ("route", "experts", "norm_experts", "pack_experts", "pack_mxfp4"),
    ),
    "check-recurrent": Section(
        _check("check_recurrent"), 30, "recurrent layers", False,
        ("causal_conv", "delta_rule", "gated_norm", "output_gate"),
    ),
    "check-sampling": Section(
        _check("check_sampling"), 30, "top-k and top-p", False,
        ("adjust_logits", "sample_rows", "argmax", "top_tokens"),
    ),
    "check-fusions": Section(
        _check("check_fusions"), 30, "fused norms", False, ("linear", "norm_qkv", "norm_mlp")
    ),
    "parity-dense": Section(
        _check("check_parity_dense", "model_checks"), 30, "tiny models: same tokens as CPU", False,
        _PARITY,
    ),
    "parity-experts": Section(
        _check("check_parity_experts", "model_checks"), 30, "the same, with experts", False,
        _PARITY,
    ),
    "tokens": Section(
        _check("check_tokens", "model_checks"), 30, "same tokens in every run and mode", False,
        _PARITY,
    ),
    "score": Section(
        _of("model_checks", "score_rows"), 30, "the embedded model's score", False
    ),
    "quick-gpt-oss": Section(
        _load("gpt-oss-20b", "gpt-oss-20b 14/991 × 4096", ("equal_load", 4096, 14, 991), 3, 256,
              _COURSE, running=True),
        17, "gpt-oss-20b, the course's load at 256",
    ),
    "quick-nano": Section(
        _load("qwen3-0.6b", "Qwen3-0.6B nano-vllm", ("nano_load",), 3), 12, "the nano-vllm load"
    ),
    "quick-llama": Section(
        _load("llama-3.1-8b", "Llama-3.1-8B 128/2048", ("equal_load", 3000, 128, 2048), 3, 64,
              f"26,221 ({_TRT}, FP8)", running=True),
        12, "Llama-3.1-8B at 64",
    ),
    "quick-qwen2": Section(
        _load("qwen2-0.5b", "Qwen2-0.5B alone", ("equal_load", 1, 800, 400), 3), 9,
        "Qwen2-0.5B, batch 1",
    ),
}  # fmt: skip

# How fast is each part, and what would be faster? Other engines come last.
FULL_BUDGET_S = 480.0
FULL: dict[str, Section] = {
    "limits": QUICK["limits"],
    "sanitizer": Section(
        _of("sanitizer", "sanitize"), 40, "compute-sanitizer, if installed", False
    ),
    **{
        f"parity-others-{part}": Section(
            _check("check_parity_others", "model_checks", part), 40,
            f"tiny models of other families ({part} of {PARITY_PARTS})", False, _PARITY,
        )
        for part in range(1, PARITY_PARTS + 1)
    },
    "check-quantized": Section(
        _check("check_quantized", "quantized"), 40, "linears and experts in 4 and 8 bits", False,
        ("linear", "logits", "norm_mlp", "experts", "norm_experts", "pack", "pack_experts"),
    ),
    "gpt-oss": Section(
        _load("gpt-oss-20b", "gpt-oss-20b 14/991 × 4096", ("equal_load", 4096, 14, 991), 12, 1024,
              _COURSE, running=True),
        42, "gpt-oss-20b, the course's load",
    ),
    "gpt-oss-1000": Section(
        _load("gpt-oss-20b", "gpt-oss-20b 1000/1000 × 3000", ("equal_load", 3000, 1000, 1000), 8,
              512, f"13,858 ({_TRT}, MXFP4)", running=True),
        36, "gpt-oss-20b, 1000 in and out",
    ),
    "nano": Section(
        _load("qwen3-0.6b", "Qwen3-0.6B nano-vllm", ("nano_load",), 14), 28, "the nano-vllm load"
    ),
    "llama-128": Section(
        _load("llama-3.1-8b", "Llama-3.1-8B 128/2048", ("equal_load", 3000, 128, 2048), 8, 256,
              f"26,221 ({_TRT}, FP8)", running=True),
        34, "Llama-3.1-8B, 128 in, 2048 out",
    ),
    "llama-1000": Section(
        _load("llama-3.1-8b", "Llama-3.1-8B 1000/1000", ("equal_load", 3000, 1000, 1000), 8, 256,
              f"17,744 ({_TRT}, FP8)", running=True),
        34, "Llama-3.1-8B, 1000 in and out",
    ),
    "qwen2-1": Section(
        _load("qwen2-0.5b", "Qwen2-0.5B alone", ("equal_load", 1, 800, 400), 5), 15,
        "Qwen2-0.5B, batch 1",
    ),
    "gpt-oss-1": Section(
        _load("gpt-oss-20b", "gpt-oss-20b alone", ("equal_load", 1, 300, 400), 5), 24,
        "gpt-oss-20b, batch 1",
    ),
    "ragged": Section(
        _load("qwen3-0.6b", "Qwen3-0.6B ragged", ("ragged_load", 1536), 8), 20,
        "more requests than a batch holds",
    ),
    "attention": Section(_of("kernels", "time_attention"), 16, "attention kernels"),
    "experts": Section(_of("kernels", "time_experts"), 16, "grouped matrix products"),
    "quantized": Section(_of("quantized", "time_quantized"), 12, "linears in 4 and 8 bits"),
    "sampling": Section(_of("kernels", "time_sampling"), 9, "top-k and top-p against a sort"),
    "torch": Section(
        _of("anchors", "time_torch_kernels"), 20, "SDPA, FlexAttention and torch._grouped_mm"
    ),
    "overlap": Section(_of("switches", "time_overlap"), 12, "programmatic launch on or off"),
    "fusions": Section(_of("switches", "time_fusions"), 16, "fused norms on or off"),
    "graphs": Section(_of("switches", "time_graphs"), 20, "graphs on or off"),
    "sweep-decode": Section(_of("sweeps", "sweep_decode"), 16, "tiles of decode attention"),
    "sweep-prefill": Section(_of("sweeps", "sweep_prefill"), 16, "tiles of prefill attention"),
    "sweep-experts": Section(_of("sweeps", "sweep_experts"), 20, "tiles of MXFP4 experts"),
    "sweep-one-row": Section(_of("sweeps", "sweep_one_row"), 10, "tiles of a single row"),
    "transformers": Section(_of("anchors", "time_transformers"), 14, "transformers"),
}  # fmt: skip
# Not counted in the budget: rarely installed, and otherwise over at once.
FULL["vllm"] = Section(_of("anchors", "time_vllm"), 120, "vLLM, if installed")
SECTIONS = QUICK | FULL
