"""Models and data: everything that happens in a client's seat."""
