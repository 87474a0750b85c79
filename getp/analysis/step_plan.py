"""Mode plan: the cost of one step of a model and its minimum time on each GPU.

Needs neither weights nor a GPU. With `-i` mode plan predicts a job instead, see `job_plan`.
"""

import contextlib
from dataclasses import asdict, dataclass
from typing import Any, cast

from getp.analysis.lookup import Model
from getp.errors import UsageProblem
from getp.terminal import warn
from model.cost.devices import Device
from model.cost.interconnect import LINKS, Exchange, exchange
from model.cost.operations import check_tensor_parallel, operations, total
from model.cost.roofline import Bound, bound_step
from model.cost.workload import Op, Phase, Workload, kv_dtype

_DEFAULT_QUERY = 1024  # tokens per sequence in a prefill or backward step
_DEFAULT_CONTEXT = 1024  # tokens per sequence in a decode step


@dataclass(frozen=True)
class Plan:
    """One step of a model, the cost of its operations, and its bound on each GPU."""

    model: Model
    work: Workload
    ops: list[Op]
    total: Op
    bounds: list[Bound]

    @property
    def exchanges(self) -> dict[int, Exchange]:
        """Return the communication per GPU, by the number of GPUs that the model is split over."""
        config, exchanges = self.model.config, {}
        for ranks in {2, 4, 8, self.work.tensor_parallel} - {1}:
            with contextlib.suppress(ValueError):
                check_tensor_parallel(config, ranks)
                exchanges[ranks] = exchange(config, self.work, ranks)
        return dict(sorted(exchanges.items()))


def make_plan(
    model: Model,
    gpus: list[Device],
    *,
    phase: str,
    batch: int,
    query: int | None,
    context: int | None,
    dtype: str,
    tensor_parallel: int = 1,
    fused: bool = False,
) -> Plan:
    """Compute the plan of a step. query, context None: the default of the phase.

    Raises UsageProblem for sizes that contradict each other.
    """
    decode = phase == "decode"
    limit = model.config.max_positions
    query = query or (1 if decode else min(_DEFAULT_QUERY, context or limit))
    context = context or (max(query, min(_DEFAULT_CONTEXT, limit)) if decode else query)
    dtype = model.config.dtype if dtype == "auto" else dtype
    if query > context:
        raise UsageProblem(
            "{query} {tokens} is larger than {context} {positions}, which includes the new tokens",
            tokens=query,
            positions=context,
        )
    check_split(model, tensor_parallel)
    work = Workload(cast(Phase, phase), batch, query, context, dtype, tensor_parallel, fused=fused)
    ops = operations(model.config, work)
    if context > limit:
        warn(f"a context of {context} tokens exceeds the limit of {model.name}: {limit} tokens")
    bounds = [bound_step(model.config, work, device) for device in gpus]
    return Plan(model, work, ops, total(ops), bounds)


def time_name(work: Workload) -> str:
    """Return what the time of a step is to each of its sequences."""
    if work.phase == "decode" and work.query == 1:
        return "time per output token"
    whole_prompt = work.phase == "prefill" and work.query == work.context
    return "time to first token" if whole_prompt else "time per step"


def check_split(model: Model, tensor_parallel: int) -> None:
    """Raise UsageProblem if the model cannot be split over that many GPUs."""
    try:
        check_tensor_parallel(model.config, tensor_parallel)
    except ValueError as error:
        raise UsageProblem("{tensor_parallel}: {reason}", reason=error) from None


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan for `--format json`: exact integers, each operation over all its layers."""
    work = plan.work
    return {
        "model": plan.model.name,
        "phase": work.phase,
        "batch": work.batch,
        "query": work.query,
        "context": work.context,
        "dtype": work.dtype,
        "kv_dtype": kv_dtype(plan.model.config, work.dtype),
        "quantization": plan.model.config.quantization,
        "fused": work.fused,
        "ops": [{"name": op.name, "layer_count": op.layer_count, **_cost(op)} for op in plan.ops],
        "total": _cost(plan.total),
        "tensor_parallel": work.tensor_parallel,
        "exchange": {
            str(ranks): {
                **asdict(sent),
                "seconds": {link.name: sent.seconds(link) for link in LINKS.values()},
            }
            for ranks, sent in plan.exchanges.items()
        },
        "gpus": [
            {
                "name": gpu_bound.device.name,
                "bound": gpu_bound.limit,
                "seconds": gpu_bound.seconds,
                "link": gpu_bound.device.link.name,
                "link_s": gpu_bound.link_s,
                "tok_s": gpu_bound.tok_s,
                "mfu": gpu_bound.mfu,
                "mbu": gpu_bound.mbu,
                "ridge": gpu_bound.device.ridge(work.dtype),
                "intensity": plan.total.intensity,
            }
            for gpu_bound in plan.bounds
        ],
    }


def _cost(op: Op) -> dict[str, Any]:
    return {"flops": asdict(op.flops), "bytes": asdict(op.bytes), "launches": op.launches}
