"""Running on a machine: recorded steps, precision, devices, threads, what CPU this is."""
