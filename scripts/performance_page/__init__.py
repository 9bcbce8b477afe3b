"""The parts of scripts/plot_performance.py: recorded data, tables, plots."""
