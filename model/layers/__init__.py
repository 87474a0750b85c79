"""The parts of a decoder layer: attention, attention to latents, the gated delta rule, and MLPs."""
