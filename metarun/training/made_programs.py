"""What makes the programs of a run by its plan: in a loop, by vmap, as many tasks as fit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from metarun.components.algo.base import Algorithm
from metarun.components.formats import with_tf32
from metarun.config.run import TrainConfig
from metarun.training.batching import TriedByVmap
from metarun.training.chunking import AsManyAsFit
from metarun.training.plan import Plan, make_plan, use_fused_norms
from metarun.training.programs import Recorder


class Programs(NamedTuple):
    """What makes the programs of a run, and has their recordings compared.

    Attributes:
        config: the user's config.
        computed: the config with what "auto" was settled to.
        recorders: of all programs.
        chunks: what finds out how many tasks fit, by program.
    """

    config: TrainConfig
    computed: TrainConfig
    algorithm: Algorithm
    plan: Plan
    model: nn.Module
    device: torch.device
    recorders: list[Recorder]
    chunks: dict[str, AsManyAsFit]

    def make(self, program: Callable[..., Any], what: str, choice: str) -> Callable[..., Any]:
        """A program of the plan; where vmap turns out not to do, of a plan with a loop.

        Args:
            program: `gradient_program`, `trace_program` or `outputs_program`.
            what: what it computes, in the plural.
            choice: the plan's field that says how it is recorded.
        """
        if self.plan.batching == "loop":
            return self.made(program, what, choice, self.plan)
        by_vmap: Callable[..., Any] = (
            self.fitted(program, what, choice)
            if self.computed.engine.chunk == "auto"
            else self.made(program, what, choice, self.plan)
        )
        engine = replace(self.computed.engine, batching="loop")
        looped = make_plan(replace(self.computed, engine=engine), self.model, self.device)

        def in_a_loop() -> Callable[..., Any]:
            use_fused_norms(self.model, looped.fused_norm)
            return self.made(program, what, choice, looped)

        return TriedByVmap(
            by_vmap,
            in_a_loop,
            what,
            insisted=self.config.engine.batching == "vmap",
        )

    def fitted(self, program: Callable[..., Any], what: str, choice: str) -> AsManyAsFit:
        """A program of the plan, as many tasks at a time as fit into memory."""
        former: list[Recorder] = []

        def of_chunk(chunk: int | None) -> Callable[..., Any]:
            for recorder in former:  # its recordings hold memory
                self.recorders.remove(recorder)
                recorder.forget()
            plan = self.plan
            if chunk is not None and choice == "compile":
                plan = plan._replace(chunk=chunk)
            elif chunk is not None:
                plan = plan._replace(evaluate_chunk=chunk)
            made = self.made(program, what, choice, plan)
            former[:] = self.recorders[-1:]
            return made

        first = self.plan.chunk if choice == "compile" else self.plan.evaluate_chunk
        fitted = AsManyAsFit(of_chunk, what, first)
        self.chunks[program.__name__.removesuffix("_program")] = fitted
        return fitted

    def made(
        self, program: Callable[..., Any], what: str, choice: str, plan: Plan
    ) -> Callable[..., Any]:
        """A program of a plan, as `make` makes it."""
        self.recorders.append(Recorder(getattr(plan, choice), what, graphs=plan.graphs))
        made: Callable[..., Any] = program(self.algorithm, plan, self.recorders[-1])
        if made is not None and self.device.type == "cuda":
            return with_tf32(self.config.engine.precision == "tf32", made)
        return made

    def recheck(self) -> None:
        """Have every recording compared with its function at its next call."""
        for recorder in self.recorders:
            recorder.recheck()
