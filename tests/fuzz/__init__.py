"""Hostile input and faults: cases made from bytes, the laws they are held to, campaigns, kills."""
