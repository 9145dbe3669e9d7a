"""Fault drills: what happens to a run when disks fill, processes die, files rot and input is not what it should be."""
