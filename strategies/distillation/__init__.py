"""How a few-step generator is made: teacher forcing, then distribution matching on its own rollouts."""
