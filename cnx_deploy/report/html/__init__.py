"""One self-contained HTML page of what is recorded, what was measured and what was not run."""
