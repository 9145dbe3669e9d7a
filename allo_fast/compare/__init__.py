"""Many methods on one job: each with settings chosen on other data than is reported, and what differs beyond chance."""
