"""Why an artifact does not compute what its network does: ranges, layers, links, modules."""
