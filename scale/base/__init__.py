"""What every room may use: files, locks, the machine, messages, processes, statistics."""
