"""Toy pages and drawings: pictures with text whose content and boxes are known, for examples and tests."""
