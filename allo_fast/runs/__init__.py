"""A run as a folder: units of work, their files and the manifests that say what is complete."""
