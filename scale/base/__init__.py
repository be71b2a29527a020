"""What every room may use: files, locks, which device, messages, processes, statistics."""
