"""What ALLO is: which weights train, a policy and its reference on one base, the losses, the sparse optimizer.

Plain PyTorch, usable in any training loop; nothing here knows of stages or of files of a run.
"""
