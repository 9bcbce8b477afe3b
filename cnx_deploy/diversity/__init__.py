"""How different a network's channels are from each other, block by block: where features have collapsed."""
