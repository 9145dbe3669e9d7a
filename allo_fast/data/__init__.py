"""From files to tensors: problems, prompts, scores and batches whose row is one problem with all its responses."""
