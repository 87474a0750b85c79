"""Replicas: many engines on Ray behind the interface of one."""
