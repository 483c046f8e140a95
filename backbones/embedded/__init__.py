"""The tiny generator of the shapes world and its packaged weights."""
