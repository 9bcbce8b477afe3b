"""Whether an artifact computes what its network does: parity, gates, metrics, provenance."""
