"""Tests of armillary; the folders mirror the source."""
