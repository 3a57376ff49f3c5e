"""Running a training run: `loop` is the algorithm, `build` puts its parts together, `service` is the named
controller others reach, `lifecycle` takes a run from a configuration to its result."""
