"""One training loop for every stage, and where its steps happen: one process, or DeepSpeed ZeRO on many."""
