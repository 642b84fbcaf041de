"""`python -m benchmarks.soak`: see `soak.py` beside this."""

import sys

from benchmarks.soak.soak import main
from utils.options import command_line

if __name__ == "__main__":
    sys.exit(command_line("benchmarks.soak", lambda: main(sys.argv[1:])))
