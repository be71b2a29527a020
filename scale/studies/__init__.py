"""Does matching pay, and why: the proof, the paper's foundations, paths, theory, prior."""
