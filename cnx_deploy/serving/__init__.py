"""Artifacts where users run them: model repositories, batches over many images, a served endpoint, other tools."""
