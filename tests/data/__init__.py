"""Tests of framework/data, and the golden files."""
