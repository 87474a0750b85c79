"""Replicas on Ray: many engines behind the interface of one. The main class is `Cluster`."""
