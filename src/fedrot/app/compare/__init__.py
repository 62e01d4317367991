"""Methods against each other: same splits, batches, start and head; a table with intervals, and figures."""
