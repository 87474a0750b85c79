"""The cost model: FLOPs, bytes and kernel launches of a step, and the time that a GPU needs for it.

Owns the arithmetic on a config (`operations`, `flops`), the limits of known GPUs and their links
(`devices`, `interconnect`), the bound that follows (`roofline`), and the measurement of this
machine (`measure`, which alone imports torch). Never loads weights or runs a model.

Four documents define the formulas; comments cite them by name: mfu-formulas ("Model FLOPs
Utilization"), qwen2-layer-data-flow, roofline-prefill-decode and bottleneck-analysis.
"""
