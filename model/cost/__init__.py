"""What a model costs: FLOPs, bytes, rooflines, devices. Pure arithmetic, without torch."""
