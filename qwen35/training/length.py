"""How long a run is: in optimizer steps, which the settings say or the data make of its epochs."""

from qwen35.config.load import LENGTHS
from qwen35.config.rules import profile_rule
from qwen35.config.schema import Settings
from qwen35.data import MicroBatches
from qwen35.errors import SettingError
from qwen35.log import logger
from qwen35.training.best import Best
from qwen35.training.resume import sequences_per_step


def end_step(best: Best, step: int, steps: int, patience: int | None) -> int:
    """The run's steps, of which `step` are done: no more if early stopping ends it here."""
    if step < steps and (why := best.why_over(patience)):
        logger.info(f"{why}: the run ends after step {step} of {steps}")
        return step
    return steps


def count_steps(settings: Settings, data: MicroBatches, world: int | None = None) -> tuple[int, float]:
    """-> the run's steps, and those of an epoch. world: as in `sequences_per_step`.

    The same on all ranks that have the same data. Raises SettingError for a profile of later steps.
    """
    t, per_step = settings.training, sequences_per_step(settings, world)
    if t.train_iters:
        return t.train_iters, data.sequences_per_epoch / per_step
    assert t.train_epochs is not None
    steps = data.packed_sequences.steps(t.train_epochs, per_step)
    for violation in profile_rule(t.profile, steps, LENGTHS[0]):
        raise SettingError(violation)
    return steps, steps / t.train_epochs
