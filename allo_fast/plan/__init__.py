"""What a job needs, on paper: memory, traffic, disk and time, counted from shapes before anything is allocated."""
