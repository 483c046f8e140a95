"""What is optimised in place of the reward."""
