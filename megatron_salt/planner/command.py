"""From the options of `megatron-salt plan` to a `PlanReport`."""

from __future__ import annotations

import argparse

from megatron_salt.config.command_line import parse_command_line
from megatron_salt.planner.estimate import full_estimate, overheads
from megatron_salt.planner.hardware import Machine, find_gpu, find_network
from megatron_salt.planner.inputs import PlannerInputs, read_inputs
from megatron_salt.planner.output import PlanReport
from megatron_salt.planner.ranking import rank
from megatron_salt.planner.times import MeasuredTimes, read_measured


def make_plan(options: argparse.Namespace, run_options: list[str]) -> PlanReport:
    """Everything that can be said about the run.

    Raises: ValueError naming option, file or setting; SystemExit for run_options, as training does.
    """
    if options.teacher_config is not None:  # stands for a checkpoint that need not be there yet
        teacher = ["--teacher.checkpoint", options.teacher_config, "--teacher.hf", "null",
                   "--teacher.logits", "[]"]  # fmt: skip
        run_options = [*run_options, *teacher]
    command = parse_command_line(run_options, prog="megatron-salt plan")
    machine = make_machine(options)
    measured = read_measured(options.measured) if options.measured else None
    if options.steps_saved is not None and not 0 <= options.steps_saved < 1:
        raise ValueError(f"--steps-saved {options.steps_saved}: must be at least 0 and below 1")
    if options.top < 1:
        raise ValueError(f"--top {options.top}: must be at least 1")
    inputs = read_inputs(
        command.config, command.deepspeed_config, options.gpus, vocab_size=options.vocab_size,
        teacher_config=options.teacher_config,
    )  # fmt: skip
    return plan_run(
        inputs, machine, measured=measured, steps_saved=options.steps_saved, top=options.top
    )


def make_machine(options: argparse.Namespace) -> Machine:
    gpu = find_gpu(options.gpu)
    shares = {name: getattr(options, name) for name in ("efficiency", "link_efficiency", "usable")}
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: a share, above 0 and at most 1")
    if options.gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node {options.gpus_per_node}: must be at least 1")
    network = find_network(options.interconnect or gpu.network)
    return Machine(gpu=gpu, network_gb_s=network, gpus_per_node=options.gpus_per_node, **shares)


def plan_run(
    inputs: PlannerInputs, machine: Machine, *, measured: MeasuredTimes | None = None,
    steps_saved: float | None = None, top: int = 5,
) -> PlanReport:  # fmt: skip
    """The config's own layout and the ranking of all; at least one of them.

    Raises: ValueError if neither is possible.
    """
    own, by_number = None, []
    if inputs.own is not None:
        sizes = inputs.at(inputs.own, inputs.settings.micro_batch_size)
        own = full_estimate(sizes, machine, measured)
        by_number = overheads(sizes, machine, None if measured else own.steps)
    elif measured is not None:
        raise ValueError(
            f"--measured is of the config's own layout, which is not possible: {inputs.own_problem}"
        )
    ranking, problem = None, ""
    try:
        ranking = rank(inputs, machine, top=top)
    except ValueError as error:
        if own is None:
            raise
        problem = str(error)
    return PlanReport(
        inputs=inputs, machine=machine, own=own, overheads=by_number, ranking=ranking,
        problem=problem, steps_saved=steps_saved, measured=measured is not None,
    )  # fmt: skip
