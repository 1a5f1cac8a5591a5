"""One run: its set-up, its loop, its state, its figures."""
