"""The layouts that train as many tokens a step on so many NPUs, whatever they cost."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from qwen35.config.layout import check_layout
from qwen35.config.schema import Settings
from qwen35.errors import SettingError

Recompute = bool | Literal["selective"]
Optimizer = Literal["adamw", "adamw_swap"]
RECOMPUTE: tuple[Recompute, ...] = (False, "selective", True)
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "adamw_swap")


@dataclass(frozen=True)
class Layout:
    """The settings that a plan chooses."""

    shard: int | None  # None: all ranks
    expert: int
    ulysses: int
    micro_batch: int
    accumulation: int
    recompute: Recompute
    offload: bool
    optimizer: Optimizer

    @property
    def mode(self) -> tuple[Recompute, bool]:
        """What decides which activations stay on the device."""
        return self.recompute, self.offload

    def applied(self, s: Settings) -> Settings:
        p = replace(
            s.parallel,
            fully_shard_parallel_size=self.shard,
            expert_parallel_size=self.expert,
            ulysses_parallel_size=self.ulysses,
            recompute=self.recompute,
            activation_offload=self.offload,
        )
        t = replace(
            s.training,
            micro_batch_size=self.micro_batch,
            gradient_accumulation_steps=self.accumulation,
            optimizer=self.optimizer,
        )
        return replace(s, parallel=p, training=t)

    @classmethod
    def of(cls, s: Settings) -> "Layout":
        p, t = s.parallel, s.training
        return cls(
            p.fully_shard_parallel_size,
            p.expert_parallel_size,
            p.ulysses_parallel_size,
            t.micro_batch_size,
            t.gradient_accumulation_steps,
            p.recompute,
            p.activation_offload,
            t.optimizer,
        )

    def yaml(self) -> str:
        """Lines for a recipe; defaults are left out, but for the sizes of a step."""
        recompute = str(self.recompute).lower()
        parallel = {
            "fully_shard_parallel_size": self.shard,
            "expert_parallel_size": self.expert if self.expert > 1 else None,
            "ulysses_parallel_size": self.ulysses if self.ulysses > 1 else None,
            "recompute": recompute,
            "activation_offload": "true" if self.offload else None,
        }
        training = {
            "optimizer": None if self.optimizer == "adamw" else self.optimizer,
            "micro_batch_size": self.micro_batch,
            "gradient_accumulation_steps": self.accumulation,
        }
        sections = (("parallel", parallel), ("training", training))
        return "\n".join(
            f"{name}:\n" + "\n".join(f"  {key}: {value}" for key, value in section.items() if value is not None)
            for name, section in sections
        )

    def __str__(self) -> str:
        words = [
            f"weights over {self.shard}" if self.shard else "",
            f"EP {self.expert}" if self.expert > 1 else "",
            f"Ulysses {self.ulysses}" if self.ulysses > 1 else "",
            f"{self.accumulation} x {self.micro_batch}",
            {True: "recompute", False: "", "selective": "recompute selective"}[self.recompute],
            "offload" if self.offload else "",
            "adamw_swap" if self.optimizer == "adamw_swap" else "",
        ]
        return ", ".join(word for word in words if word)


def layouts(s: Settings, nodes: int, per_node: int, tokens: int) -> Iterator[Layout]:
    """All that train `tokens` a step on these NPUs and that the model can be cut into."""
    world, cutoff_len = nodes * per_node, s.data.dataset_param.basic_parameters.cutoff_len
    shards = [None, *(per_node * n for n in divisors(nodes) if n < nodes)]
    for shard in shards:
        for expert in divisors(shard or world):
            for ulysses in divisors(per_node):
                sequences, rest = divmod(tokens, world // ulysses * cutoff_len)
                if rest or not sequences or not _divides(s, world, shard, expert, ulysses, sequences):
                    continue
                for micro_batch, recompute, offload in product(divisors(sequences), RECOMPUTE, (False, True)):
                    for optimizer in OPTIMIZERS[: 1 if s.training.lora else 2]:
                        cut = micro_batch, sequences // micro_batch
                        yield Layout(shard, expert, ulysses, *cut, recompute, offload, optimizer)


def _divides(s: Settings, world: int, shard: int | None, expert: int, ulysses: int, sequences: int) -> bool:
    layout = Layout(shard, expert, ulysses, 1, sequences, True, False, "adamw")
    try:
        check_layout(layout.applied(s), world)
    except SettingError:
        return False
    return True


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
