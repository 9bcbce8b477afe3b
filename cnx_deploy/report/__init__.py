"""Records and tables, the HTML page, and what this machine can do."""
