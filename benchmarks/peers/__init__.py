"""Steps a second of other libraries' training and of ours, in turn: `python -m benchmarks.peers`."""
