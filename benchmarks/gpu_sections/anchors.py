"""Other kernels and engines on the same GPU in the same run.

All of them are optional: what is missing or fails is named in a row and does not stop the others.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.gpu_sections.inputs import COMPUTES, CUDA, rand
from benchmarks.gpu_sections.kernels import ATTENTION_SHAPES, COUNT, SIZE, TOP_K
from benchmarks.gpu_sections.loads import dummy_checkpoint, nano_load
from benchmarks.gpu_sections.measure import Limits, Row, note, seconds_of
from model.cost.known_models import KNOWN_CONFIGS

if not COMPUTES:  # cuDNN does not take the simulated GPU, so torch's own attention is called there
    torch.backends.cuda.enable_cudnn_sdp(False)


def optional(title: str, rows: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Yield the rows; an error becomes a row that names it in one line."""
    try:
        yield from rows()
    except Exception as error:
        cause = (str(error).strip().splitlines() or [""])[0][:200]
        yield note(f"{title}: not measured: {type(error).__name__}: {cause}")


def time_torch_kernels(limits: Limits) -> Iterator[Row]:
    """Time torch's attention and grouped products on the shapes of `kernels`."""
    sections = {
        "SDPA": partial(_attention, limits, "SDPA", _sdpa),
        "torch._grouped_mm": partial(_grouped_mm, limits),
        # Last, because it compiles for seconds for each shape.
        "FlexAttention": partial(_attention, limits, "FlexAttention", _flex),
    }
    for title, rows in sections.items():
        yield from optional(title, rows)


_MARGIN = 1.5  # times the longest shape so far: what the next one may take
_STEPS = ((64, 2000), (256, 1000), (1, 8192))  # rows and context; one row: a whole prompt
_Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Callable[[], Any]]


def _attention(limits: Limits, title: str, attend: _Attend) -> Iterator[Row]:
    """Time attention over dense keys and values, which a paged cache does not have.

    Shapes are left out if another one would probably not be done when the section is stopped.
    """
    longest = 0.0
    for (heads, kv_heads, dim), (rows, context) in itertools.product(ATTENTION_SHAPES, _STEPS):
        is_decode = rows > 1
        shape = f"{heads}/{kv_heads} heads of {dim}"
        name = f"{title}: decode {shape}, {rows} x {context}"
        if not is_decode:
            name = f"{title}: prefill {shape}, {context} tokens"
        started = time.time()
        if started + _MARGIN * longest > limits.until:
            yield note(f"{name}: left out for lack of time")
            continue
        query = rand(rows, heads, 1 if is_decode else context, dim, dtype=torch.bfloat16)
        keys, values = rand(2, rows, kv_heads, context, dim, dtype=torch.bfloat16)
        spent = seconds_of(attend(query, keys, values))
        longest = max(longest, time.time() - started)
        if is_decode:
            rate = 2 * keys.nbytes / spent
            yield Row(name, rate / 1e12, "TB/s", rate / limits.copy, "copy")
        else:
            rate = 4 * heads * dim * context * (context + 1) / 2 / spent
            yield Row(name, rate / 1e12, "TFLOP/s", rate / limits.product, "product")


def _sdpa(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Callable[[], Any]:
    return partial(
        torch.nn.functional.scaled_dot_product_attention,
        query,
        keys,
        values,
        is_causal=query.shape[2] > 1,
        enable_gqa=True,
    )


def _flex(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Callable[[], Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask, count = None, query.shape[2]
    if count > 1:
        mask = create_block_mask(
            lambda batch, head, row, key: row >= key, None, None, count, count, device=CUDA
        )
    torch.compiler.reset()  # after eight shapes torch would no longer compile
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, query, keys, values, block_mask=mask, enable_gqa=True)


def _grouped_mm(limits: Limits) -> Iterator[Row]:
    """Time the two products of gpt-oss-20b's experts in bf16, without the activation between."""
    up, down = (rand(COUNT, n, SIZE, dtype=torch.bfloat16) for n in (2 * SIZE, SIZE))
    for tokens in (64, 1024, 8192):
        x = rand(tokens * TOP_K, SIZE, dtype=torch.bfloat16)
        ends = torch.arange(1, COUNT + 1, device=CUDA, dtype=torch.int32) * (len(x) // COUNT)

        def products(x: torch.Tensor = x, ends: torch.Tensor = ends) -> None:
            for weight in (up, down):
                torch._grouped_mm(x, weight.transpose(1, 2), offs=ends)

        spent = seconds_of(products)
        title = f"torch._grouped_mm: bf16 experts, {tokens} tokens"
        moved = up.nbytes + down.nbytes
        yield Row(title, moved / spent / 1e12, "TB/s", moved / spent / limits.copy, "copy")
        rate = 2 * 3 * SIZE**2 * len(x) / spent
        yield Row(title, rate / 1e12, "TFLOP/s", rate / limits.product, "product")


def time_transformers(limits: Limits) -> Iterator[Row]:
    """Measure continuous batching of transformers on the first prompts of the nano-vllm load."""
    yield from optional("transformers", partial(_transformers, 64, 128))


def time_vllm(limits: Limits) -> Iterator[Row]:
    """Measure vLLM on the nano-vllm load, if it is installed."""
    if find_spec("vllm") is None:
        yield note("vLLM: not installed")
    else:
        yield from optional("vLLM", _vllm)


def _transformers(requests: int, outputs: int) -> Iterator[Row]:
    import transformers

    config = transformers.AutoConfig.for_model(**KNOWN_CONFIGS["qwen3-0.6b"])
    with torch.device(CUDA):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    prompts = nano_load()[0][:requests]
    settings = transformers.GenerationConfig(
        max_new_tokens=outputs, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    model.generate_batch(inputs=prompts[:4], generation_config=settings)
    start = time.perf_counter()
    done = model.generate_batch(inputs=prompts, generation_config=settings)
    spent = time.perf_counter() - start
    # transformers only logs errors and returns the tokens generated before them.
    counts = [len(output.generated_tokens) for output in done.values()]
    if counts != [outputs] * requests:
        raise RuntimeError(f"transformers generated {sum(counts)} of {requests * outputs} tokens")
    rate = sum(counts) / spent
    title = f"transformers {transformers.__version__}, {requests} requests, {outputs} outputs each"
    yield Row(title, rate, "tok/s")


def _vllm() -> Iterator[Row]:
    import vllm

    prompts, outputs = nano_load()
    with dummy_checkpoint("qwen3-0.6b") as folder:
        model = vllm.LLM(str(folder), load_format="dummy", skip_tokenizer_init=True)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [
            vllm.SamplingParams(temperature=0, ignore_eos=True, max_tokens=count, detokenize=False)
            for count in outputs
        ]
        model.generate(inputs[:4], params[:4])
        start = time.perf_counter()
        model.generate(inputs, params)
        yield Row(f"vLLM {vllm.__version__}", sum(outputs) / (time.perf_counter() - start), "tok/s")
