"""Modes plan and profile: predicted costs of steps and jobs, and measured steps."""
