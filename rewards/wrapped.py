"""A reward around another one: what it does not change, the one inside answers."""

from collections.abc import Mapping

from framework.interfaces import RewardModel


class WrappedReward(RewardModel):
    """Scores are the wrapper's; signals, availability, metrics and memory those of ``model``."""

    model: RewardModel

    @property
    def signals(self) -> tuple[str, ...]:
        return self.model.signals

    def unavailable(self) -> str | None:
        return self.model.unavailable()

    def metrics(self) -> Mapping[str, float]:
        return self.model.metrics()

    def state_dict(self) -> dict:
        return self.model.state_dict()

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state)
