"""Copies between host and device."""

import torch

from engine.execution.transfer import HostCopy


def test_a_host_copy_keeps_its_values_when_the_tensor_is_written_again() -> None:
    """As a replayed step does, which may be launched before the one before it is read."""
    tokens, logprobs = torch.tensor([3, 4]), torch.tensor([[-0.5], [-1.5]])
    copy = HostCopy(tokens, logprobs)
    tokens.fill_(9)
    logprobs.zero_()
    assert copy.read() == [[3, 4], [[-0.5], [-1.5]]]
