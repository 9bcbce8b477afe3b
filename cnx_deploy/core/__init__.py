"""What every stage stands on: errors, variants, precision, manifests, artifacts, files, the system."""
