"""Where two runs of one network part: every module's output, side by side."""
