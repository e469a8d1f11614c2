"""Studies: questions of post-training, put to Kedge, with a figure for the docs."""
