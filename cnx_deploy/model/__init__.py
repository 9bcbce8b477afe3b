"""The network: training form, weights in and out, deploy form."""
