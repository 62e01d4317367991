"""Rounds between sites: what travels, a client's seat at its own site, and the engine. Knows no transport."""
