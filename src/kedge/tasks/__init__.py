"""The embedded tasks: text that Kedge makes itself; `kedge.tasks.sums`, `kedge.tasks.prose`."""
