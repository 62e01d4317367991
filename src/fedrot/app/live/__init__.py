"""How a run stands: a summary of its folder, in the terminal and on a page that keeps itself up to date."""
