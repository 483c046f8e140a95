"""Golden cases: numbers of released systems that our code must reproduce. Run them with ``python -m tests.golden``.

Each ``.safetensors`` file holds inputs, expected tensors and, as JSON in its metadata, all hyper-parameters. A module
per kind of case computes the expected tensors with this project's own code; whatever a file holds is compared, declared
as an input, or declared as not taken up.
"""
