"""What a number that counts something must be, said in the words of whoever takes it."""


def check_counts(owner: str, **counts: int | None) -> None:
    """Raises ValueError for a count below 1; None, where a parameter takes it, stands for all or for no bound.

    owner: what stands before the name in the message: ``train.``, ``LoRA.``, ``--``.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{owner}{name} must be at least 1, got {value}")
