"""Rounds, and the engines they run on."""
