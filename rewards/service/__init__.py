"""Rewards that are computed elsewhere: in a process of their own, or behind HTTP."""
