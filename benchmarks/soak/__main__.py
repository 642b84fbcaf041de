"""`python -m benchmarks.soak`: see `soak.py` beside this."""

import sys

from benchmarks.soak.soak import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
