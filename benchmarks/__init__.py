"""Speed against others and against the hardware's limits.

    python -m benchmarks.cpu        training steps and inference of whole models beside PyTorch, ONNX Runtime and OpenVINO; --growth: how
                                    time and memory grow with the batch and with tokens
    python -m benchmarks.kernels    every op against its arithmetic and the bytes it must move
    python -m benchmarks.start      import, and time to the first training step
    python -m benchmarks.cascade    what stopping early saves a cascade, in multiply-adds and in time; --ablation: what reuse brings

Each proves itself correct before it measures, prints a table, and takes --tiny (seconds, for tests), --json PATH and --save, which puts
the result beside those of other machines into `results/`. `LOG.md` keeps what was tried.
"""
