"""What keeps the policy near a reference."""
