"""armillary: preference alignment of streaming autoregressive video generators, in interchangeable parts."""

__version__ = "0.1.0"
