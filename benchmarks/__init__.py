import utils.interrupts  # noqa: F401  first, for what a command imports takes seconds
