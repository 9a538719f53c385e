"""Execution: recorded steps, precision, devices, threads and a description of the machine."""
