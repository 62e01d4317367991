"""One file a task family: what an example is, how it is encoded, how it is scored."""
