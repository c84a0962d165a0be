def check_encodings() -> None:
    """Placeholder until the self-test lands."""
