"""The cost model: FLOPs, bytes and kernel launches of a step, and the time that a GPU needs for it.

Owns the arithmetic on a config (`operations`, `flops`), the limits of known GPUs and their links
(`devices`, `interconnect`), the bound that follows (`roofline`), the time of a step at measured
rates of a CPU's kernels (`rates`), and the measurement of this machine (`measure` and
`measure_rates`, which alone import torch). Never loads weights or runs a model.

Four documents define the formulas; comments cite them by name: mfu-formulas ("Model FLOPs
Utilization"), qwen2-layer-data-flow, roofline-prefill-decode and bottleneck-analysis.
"""
