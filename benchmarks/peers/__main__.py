"""`python -m benchmarks.peers`, see compare.py."""

import sys

from benchmarks.peers.compare import main
from utils.options import command_line

if __name__ == "__main__":
    sys.exit(command_line("benchmarks.peers", lambda: main(sys.argv[1:])))
