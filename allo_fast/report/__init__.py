"""What a person looks at when a run is done: the summary, the table in the terminal and the page with its figures."""
