"""Tests of framework/."""
