"""The machine: files and locks, signals, processes, memory, the processes of a run."""
