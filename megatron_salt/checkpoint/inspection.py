"""Looking into checkpoints: what one is, whether every byte of it is good, in what two differ; and
a checkpoint made of another one, at another layout or without its optimizer's state.

What is looked at is only read. Weights are taken one by one, the states of the optimizer as well.
"""

from __future__ import annotations

import math
import shutil
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from megatron_salt.checkpoint import manifest, optimizer
from megatron_salt.checkpoint.folder import write_model_manifest
from megatron_salt.checkpoint.optimizer import MASTER, OPTIMIZER_INDEX
from megatron_salt.checkpoint.shards import WHOLE, Cut, shard_numel
from megatron_salt.checkpoint.weights import WeightFiles, write_weights
from megatron_salt.config.deepspeed import read_json
from megatron_salt.config.problems import indivisible_sizes
from megatron_salt.files.disk import atomic_folder, check_new_folder, save_tensors
from megatron_salt.model.costs import balanced_stages, layer_costs
from megatron_salt.model.weights import padded_vocab, shard_shape

# Of a manifest: what no two checkpoints have in common, and no setting explains.
RESULTS = ("name", "evaluation", "switch", "loss_scaler", "data_rows", "tokens")


class _Contents:
    """The tensors of a checkpoint, one at a time: each whole, or cut as a layout has it."""

    def __init__(self, folder: Path, *, with_optimizer: bool) -> None:
        """Raises: ValueError naming the file and what is missing or damaged."""
        self.folder, about = folder, manifest.read_checkpoint_manifest(folder)
        self.weights = WeightFiles(folder, about)
        self.optimizer = optimizer.StoredOptimizer(folder, about) if with_optimizer else None
        self.states = self.optimizer.index.states if self.optimizer else []

    def read(self, name: str, state: str = "", cut: Cut = WHOLE) -> Tensor:
        """A weight, or one of the optimizer's states of it."""
        spec = self.weights.table[name]
        shape = spec.shape if cut == WHOLE else shard_shape(spec, cut.tp_size, cut.padded_vocab)
        part = range(math.prod(shape))
        if state:
            assert self.optimizer is not None
            return self.optimizer.read(name, state, cut, part).view(shape)
        dtype = self.weights.read(name, WHOLE, range(1)).dtype  # which mere padding has lost
        return self.weights.read(name, cut, part).view(shape).to(dtype)


def describe_briefly(folder: Path) -> tuple[str, bool]:
    """A line about a checkpoint: its size, and whether it is whole (hashes are not compared).

    Returns: the line, and whether something is wrong. What is unfinished or was set aside is not
        wrong: no run takes it.
    """
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    line = f"{folder.name:<24}{_mib(size):>14}  "
    if folder.name.startswith("."):
        return f"{line}unfinished: being written or removed, or what a killed run left", False
    aside = not folder.name.startswith("step_")
    try:
        about = manifest.read_checkpoint_manifest(folder)
    except (OSError, ValueError) as error:
        return f"{line}{'set aside' if aside else 'damaged'}: {error}", not aside
    missing = "" if OPTIMIZER_INDEX in about.files else ", without optimizer state"
    return f"{line}{'set aside' if aside else 'whole'}{missing}", False


def describe_checkpoint(folder: Path) -> list[str]:
    """What a checkpoint is and what it is good for: all but its tensors.

    Raises: ValueError naming the file that is damaged.
    """
    about = manifest.read_checkpoint_manifest(folder)
    model, run, score = about.model, about.training, about.model.evaluation
    done, layout = "without its run", f"tp {model.tp_size}, pp {model.pp_size}"
    if run is not None:
        done = f"next phase {run.phase}, {run.tokens:,} tokens of {run.data_rows:,} sequences"
        layout += f", dp {run.dp_size}, ZeRO {run.zero_stage}"
    kept = "none"
    if OPTIMIZER_INDEX in about.files:
        index = optimizer.StoredOptimizer(folder, about).index
        numbers = {**index.scalars}
        if run is not None and run.loss_scaler:
            numbers["loss scale"] = run.loss_scaler["cur_scale"]
        kept = ", ".join([*index.states, *(f"{k} {v:.10g}" for k, v in numbers.items())])
    sizes = []
    for name, start in (("weights", "weights/"), ("optimizer", "optimizer/"), ("in all", "")):
        found = [each["bytes"] for file, each in about.files.items() if file.startswith(start)]
        sizes.append(f"{name} {_mib(sum(found))} in {len(found)} files")
    here = manifest.installed_versions()
    versions = (
        f"{name} {version}" + ("" if here.get(name) == version else f" (here {here.get(name)})")
        for name, version in about.versions.items()
    )
    held_out = "none"
    if score is not None:
        held_out = f"{score.ce_nats:.4f} nats/token after step {score.step}, accuracy "
        held_out += f"{score.accuracy:.4f}, {score.tokens:,} tokens"
    if run is not None and run.teacher_valid_ce_nats is not None:
        held_out += f"; its teacher's {run.teacher_valid_ce_nats:.4f}"
    why_not = "no run" if run is None else "no optimizer state" if kept == "none" else ""
    others = "to teach, to be evaluated, to start from (train.init_from)"
    return [
        f"{folder}: {model.name}, step {model.step}, {done}",
        f"model: {model.num_parameters:,} parameters, {model.config.num_layers} layers of "
        f"{model.config.hidden_size}, vocabulary {model.vocab_size}, sequences of "
        f"{model.seq_length}, {' '.join(model.objective)}",
        f"layout: {layout}, {model.precision}",
        f"optimizer: {kept}",
        f"size: {', '.join(sizes)}",
        f"versions: {', '.join(versions)}",
        f"evaluation: {held_out}",
        f"good for: {others}; not to be resumed: {why_not}" if why_not else
        f"good for: to be resumed at any layout, {others}",
    ]  # fmt: skip


def checkpoint_problems(folder: Path) -> Iterator[str]:
    """What is wrong with a checkpoint, each naming its file: bytes that are not those written, what
    cannot be read, numbers that are not finite, weights that are not their master weights rounded.
    """
    try:
        about = manifest.read_checkpoint_manifest(folder)
        damaged = False
        for name in about.files:
            try:
                manifest.verify_hashes(folder, about, [name])
            except (OSError, ValueError) as error:
                damaged = True
                yield str(error)
        if damaged:
            return  # what can be read says nothing
        contents = _Contents(folder, with_optimizer=OPTIMIZER_INDEX in about.files)
        for name in contents.weights.table:
            weight, file = contents.read(name), contents.weights.file_of(name)
            if not weight.isfinite().all():
                yield f"{file}: {name} is not finite"
            if contents.states:
                wrong = int((contents.read(name, MASTER).to(weight.dtype) != weight).sum())
                if wrong:
                    yield (
                        f"{file}: {wrong} of {weight.numel()} elements of {name} are not the "
                        f"rounded master weights of {folder / 'optimizer'}"
                    )
        for path, key, fragment in contents.optimizer.fragments() if contents.optimizer else ():
            if not fragment.isfinite().all():
                yield f"{path}: {key} is not finite"
    except (OSError, ValueError) as error:
        yield str(error)


class Difference(NamedTuple):
    """A weight, or one of the optimizer's states of it (NAME/STATE), in two checkpoints."""

    name: str
    same: bool
    """Bit by bit."""
    max_abs: float
    relative: float
    """Norm of the difference, of the first one's norm."""


def tensor_differences(first: Path, second: Path, *, with_optimizer: bool) -> Iterator[Difference]:
    """What two checkpoints of one shape hold, weight by weight; they may be of two layouts.

    Memory: one weight of each and their difference.
    Raises: ValueError naming the file that is damaged, or what of the shape differs.
    """
    one, other = (_Contents(each, with_optimizer=with_optimizer) for each in (first, second))
    if one.weights.table != other.weights.table or one.states != other.states:
        states = "" if one.states == other.states else f"; states {one.states}, {other.states}"
        changed = "; ".join(changed_between(first, second))
        raise ValueError(f"{first} and {second} are not of one shape: {changed}{states}")
    for name in one.weights.table:
        for state in ("", *one.states):
            mine, theirs = one.read(name, state), other.read(name, state)
            bits = (each.contiguous().view(torch.uint8) for each in (mine, theirs))
            same = mine.dtype == theirs.dtype and torch.equal(*bits)
            delta = theirs.float() - mine.float()
            norm, of = (float(each.float().norm(dtype=torch.float64)) for each in (delta, mine))
            relative = norm / of if of else math.inf if norm else 0.0
            key = f"{name}/{state}" if state else name
            yield Difference(key, same, float(delta.abs().max()), relative)


def changed_between(first: Path, second: Path) -> list[str]:
    """`what: first -> second` for all but tensors and results in which two checkpoints differ.

    Raises: ValueError naming the file that is damaged.
    """
    facts = []
    for folder in (first, second):
        about = manifest.read_checkpoint_manifest(folder)
        model, run = asdict(about.model), asdict(about.training) if about.training else {}
        sections = {**run.pop("config", {}), "model": model.pop("config")}
        known = {**model, **run, **about.versions}
        for section, values in sections.items():
            known |= {f"{section}.{field}": value for field, value in values.items()}
        if "deepspeed.json" in about.files:
            known |= read_json(str(folder / "deepspeed.json"))
        facts.append({key: value for key, value in known.items() if key not in RESULTS})
    one, other = facts
    keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    return [f"{key}: {one.get(key)} -> {other.get(key)}" for key in keys]


def rewrite_checkpoint(
    source: Path, target: Path, *, tp_size: int | None, pp_size: int | None, strip: bool
) -> None:
    """Make a checkpoint of another one: at another layout, or without the optimizer's state.

    Every byte of the source is verified before, every number of the new one is read back and
    compared after. Where the layout stays the files of weights do, and with them the identity that
    the model has as a teacher.

    Args: tp_size, pp_size: None: as it is.
    Memory: the tensors of one file.
    Raises: ValueError or OSError naming setting or file. `target` is there as a whole or not at
        all.
    """
    check_new_folder(target)
    if source.resolve() in target.resolve().parents:
        raise ValueError(f"{target} is within {source}, which is left as it is: name another one")
    about = manifest.read_checkpoint_manifest(source)
    was, run = about.model, about.training
    model = replace(was, tp_size=tp_size or was.tp_size, pp_size=pp_size or was.pp_size)
    recut = (model.tp_size, model.pp_size) != (was.tp_size, was.pp_size)
    if not recut and not strip:
        raise ValueError(f"{source} is at tp {was.tp_size}, pp {was.pp_size} already: copy it")
    stages = _stages(model) if recut else []
    manifest.verify_hashes(source, about, list(about.files))
    with_optimizer = OPTIMIZER_INDEX in about.files and not strip
    anew = ("optimizer/", "weights/")[: 2 if recut else 1]
    try:
        with atomic_folder(target) as partial:
            for name in (name for name in about.files if not name.startswith(anew)):
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source / name, partial / name)
            if recut:
                _write_recut(
                    partial, _Contents(source, with_optimizer=with_optimizer), model, stages
                )
                run = run and replace(run, dp_size=1)
            write_model_manifest(partial, model, run, about.versions)
            for each in tensor_differences(source, partial, with_optimizer=with_optimizer):
                if not each.same:
                    raise RuntimeError(f"{target}: {each.name} is not what was written")
    except SafetensorError as error:
        raise OSError(f"{target} cannot be written: {error}") from error


def _stages(model: manifest.ModelRecord) -> list[int]:
    """The transformer layer that each stage begins with, as the trainer divides them.

    Raises: ValueError for a layout that the model cannot have.
    """
    for uneven in indivisible_sizes(model.config, model.tp_size):
        raise ValueError(f"{model.name}: {uneven}: choose another --tp")
    costs = layer_costs(model.config, model.vocab_size, model.seq_length)
    return list(balanced_stages(costs, model.pp_size)[:-1])


def _stage_of(name: str, stages: list[int]) -> int:
    """The stage that writes a weight: of a tied embedding the first one."""
    if name.startswith("layers."):
        return bisect_right(stages, int(name.split(".")[1])) - 1
    return 0 if name.startswith(("embedding.", "position_embedding.")) else len(stages) - 1


def _write_recut(
    partial: Path, contents: _Contents, model: manifest.ModelRecord, stages: list[int]
) -> None:
    """Weights and optimizer state as a rank for each stage and part of it would write them."""
    parts, table = [], contents.weights.table
    padded = padded_vocab(model.config, model.vocab_size, model.tp_size)
    for rank in range(model.pp_size * model.tp_size):
        pp_rank, tp_rank = divmod(rank, model.tp_size)
        cut = Cut(tp_rank, model.tp_size, padded)
        own = [name for name in table if _stage_of(name, stages) == pp_rank]
        weights = {name: contents.read(name, "", cut) for name in own}
        write_weights(partial, pp_rank, tp_rank, weights)
        del weights
        if contents.optimizer is None:
            continue
        held = [name for name in own if tp_rank == 0 or table[name].sharding != "replicated"]
        tensors = {
            f"{name}/{state}": contents.read(name, state, cut).flatten()
            for name in held for state in contents.states
        }  # fmt: skip
        part = optimizer.OptimizerPart(
            file=optimizer.optimizer_file(rank), tp_rank=tp_rank,
            fragments={name: (0, shard_numel(table[name], model.tp_size, padded)) for name in held},
        )  # fmt: skip
        (partial / part.file).parent.mkdir(exist_ok=True)
        save_tensors(partial / part.file, tensors)
        parts.append(part)
    if contents.optimizer is not None:
        index, num = contents.optimizer.index, len(parts)
        optimizer.write_optimizer_index(
            partial, model, parts, [index.states] * num, [index.scalars] * num
        )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
