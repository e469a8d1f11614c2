"""The embedded tasks: text that Kedge makes itself, imported by name (`kedge.tasks.sums`, `kedge.tasks.prose`)."""
