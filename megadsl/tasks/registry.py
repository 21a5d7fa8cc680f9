"""Tasks by name. A new one is a folder with a class derived from Task, and a line here. Without torch.

A package of one's own adds tasks by entry points of the group "megadsl.tasks" (name = module:class), as pip installs them.
"""

import difflib
from importlib import import_module
from importlib.metadata import entry_points

from megadsl.config import Config
from megadsl.errors import UserError
from megadsl.tasks.length import with_length
from megadsl.tasks.task import Task

# name -> "module:class"
TASKS = {
    "causal_language_modeling": "megadsl.tasks.language.causal:CausalLanguageModeling",
    "masked_language_modeling": "megadsl.tasks.language.masked:MaskedLanguageModeling",
    "denoising": "megadsl.tasks.language.denoising:Denoising",
    "text_classification": "megadsl.tasks.text.classification:TextClassification",
    "multiple_choice": "megadsl.tasks.text.multiple_choice:MultipleChoice",
    "question_answering": "megadsl.tasks.text.question_answering:QuestionAnswering",
    "image_classification": "megadsl.tasks.image.task:ImageClassification",
    "translation": "megadsl.tasks.translation.task:Translation",
    "speech_translation": "megadsl.tasks.speech.task:SpeechTranslation",
}
GROUP = "megadsl.tasks"
# What a model of a family learns where task.name does not say.
DEFAULTS = {"decoder": "causal_language_modeling", "encoder": "masked_language_modeling", "encoder_decoder": "denoising"}


def task_class(name: str) -> type[Task]:
    """The class of a task; UserError where there is none of that name."""
    if name not in TASKS:
        for entry in entry_points(group=GROUP):
            if entry.name == name:
                return entry.load()
        near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.0)[0]
        raise UserError(f"There is no task '{name}' (task.name); did you mean {near}? (known: {', '.join(TASKS)})")
    module, _, cls = TASKS[name].partition(":")
    return getattr(import_module(module), cls)


def task_of(config: Config) -> Task:
    """The task that a configuration asks for.

    Raises:
        UserError: no such task, one that does not go with model.family, or options that it does not take.
    """
    name = config.task.name or DEFAULTS[config.model.family]
    cls = task_class(name)
    for key in config.task.options:
        owners = [other for other in TASKS if key in task_class(other).Options.model_fields]
        if key not in cls.Options.model_fields and owners:
            raise UserError(f"task.{key} is an option of {' and '.join(owners)}, not of task.name {name}; leave it away.")
    return cls(config)


def resolved(config: Config) -> Config:
    """The configuration with its task's name and all options written out and its length worked out, as it is shown and saved."""
    task = task_of(config)
    section = type(config.task).model_validate({"name": task.name, **task.options.model_dump(mode="json")})
    return with_length(config.model_copy(update={"task": section}), task.samples_per_epoch)
