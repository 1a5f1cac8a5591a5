"""What a loss changes beside its result: buffers, counters, iterators, random numbers."""
