"""Timing of runners: in turns, judged while timed, with what the machine and the hardware's bounds say of it."""
