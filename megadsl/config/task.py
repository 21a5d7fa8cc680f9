"""Section `task`: what the model learns. Its options are the task's own, which validates them (megadsl/tasks)."""

from pydantic import ConfigDict, Field

from megadsl.config.section import Section


class TaskConfig(Section):
    """Name of the task, and the task's own options beside it."""

    model_config = ConfigDict(extra="allow")

    name: str | None = Field(None, description="what is learnt; default: the language modelling of model.family")

    @property
    def options(self) -> dict:
        """What is given beside the name, not yet validated."""
        return dict(self.model_extra or {})
