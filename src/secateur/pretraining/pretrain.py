"""Pre-train a model that prunes its own experts, with every setting as a keyword."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Unpack

from secateur.decide.rules import RuleOptions, check_names, spelled_out
from secateur.errors import SecateurError
from secateur.files.given import StrPath, StrPaths, as_texts, check_given
from secateur.files.progress import OnStage
from secateur.plans import Plan
from secateur.pretraining.options import DEVICES, PretrainOptions, option
from secateur.pretraining.run_folder import RunFolder
from secateur.results import Result

P = ParamSpec("P")
R = TypeVar("R")
GIVEN: ContextVar[frozenset[str]] = ContextVar("the keywords that a call gave")


def _knowing_its_call(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function see which keywords its caller gave: what is given may be equal to the default."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        before = GIVEN.set(frozenset(kwargs))
        try:
            return function(*args, **kwargs)
        finally:
            GIVEN.reset(before)

    return call


@dataclass(frozen=True, kw_only=True)
class Pretrained(Result):
    """What `pretrain` did; `to_json` is what report.json says, in a dry run the plan of the run.

    Args:
        out: the folder of the run.
        model, page: the folder of the model in it, and report.html; in a dry run they are not there.
        plan: which experts the model has of those it began with; None in a dry run, and on a rank that does not see
            the folder.
        events: what was pruned and re-arranged at which step, as JSON.
        validation_loss: in nats a token; None in a dry run.
    """

    out: Path
    model: Path
    page: Path
    plan: Plan | None = field(repr=False)
    events: tuple[Mapping[str, Any], ...]
    validation_loss: float | None

    def table(self) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
        rows: list[Sequence[object]] = [("run", self.out)]
        if self.plan is not None:
            rows += [("model", self.model), ("report", self.page), ("validation loss", self.validation_loss)]
        for event in self.events:
            counts = f"{event['experts_before']} -> {event['experts_after']} experts"
            rows.append((f"step {event['step']}", counts))
        return ("", "value"), rows


@spelled_out
@_knowing_its_call
def pretrain(
    out: StrPath,
    *,
    preset: str | None = None,
    config: StrPath | None = None,
    model: StrPath | None = None,
    set: Mapping[str, Any] | None = None,
    data: StrPaths | None = None,
    text_key: str = "text",
    tokenizer: StrPath | None = None,
    vocab_size: int = 4096,
    sequence_length: int = 256,
    validation_share: float = 0.02,
    max_data_bytes: int | None = None,
    steps: int = 600,
    batch_size: int = 8,
    accumulation: int = 1,
    learning_rate: float = 2e-3,
    warmup_steps: int = 20,
    schedule: str = "cosine",
    weight_decay: float = 0.1,
    optimizer: str = "adamw_torch",
    max_grad_norm: float = 1.0,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    gradient_checkpointing: bool = False,
    seed: int = 0,
    threads: int | None = None,
    fsdp: int | None = None,
    ep: int = 1,
    tp: int = 1,
    balance: Literal["none", "mixtral", "deepseek_v3", "bias"] = "none",
    balance_strength: float | None = None,
    no_prune: bool = False,
    prune: str | Sequence[str] | None = None,
    uniform: bool = False,
    prune_at_step: int | None = None,
    prune_at_tokens: int | None = None,
    multiple_of: int = 1,
    min_experts: int = 1,
    max_experts: int | None = None,
    no_rearrange: bool = False,
    rearrange_ranks: int | None = None,
    rearrange_every: int | None = None,
    rearrange_method: Literal["swaps", "greedy", "exact"] = "swaps",
    rearrange_nodes: int = 1,
    rearrange_tolerance: float | None = None,
    window_steps: int = 20,
    max_regret: float = 0.025,
    max_noise: float = 0.005,
    min_change: float | None = None,
    min_windows: int = 16,
    log_steps: int = 10,
    eval_steps: int = 100,
    save_steps: int = 200,
    report_to: str = "none",
    control: bool = False,
    checkpoint_on_sigterm: bool = True,
    resume: bool = False,
    dry_run: bool = False,
    on_progress: OnStage | None = None,
    **rule: Unpack[RuleOptions],
) -> Pretrained:
    """Pre-train a Mixture-of-Experts language model that prunes its own experts (LAEP, arXiv 2601.14327).

    On several devices, torchrun starts a program that calls it on every rank. The process's random numbers are seeded.

    Args:
        out: folder of the run: new or empty, or with `resume` an earlier run.
        preset: a small model: qwen3_moe (the default), olmoe, mixtral, deepseek_v3, gpt_oss, qwen3_next.
        config: a transformers config.json of any MoE causal LM; random weights.
        model: a folder with a model whose pre-training goes on.
        set: fields of the config that are changed, such as {"num_hidden_layers": 8}.
        data: files, folders or globs of .txt .md .py .jsonl .parquet, or hf:NAME for a datasets name; NAME=... names
            the domain. Without it, this Python's standard library and reference prose.
        text_key: key or column of the text in .jsonl, .parquet and datasets.
        tokenizer: folder of a tokenizer; without it, a byte-level BPE is trained on the data.
        vocab_size: size of the tokenizer that is trained. sequence_length: tokens a sequence.
        validation_share: share of the documents kept for validation.
        max_data_bytes: use at most this much training text. steps: optimizer steps.
        batch_size: sequences a micro-batch, over all processes. accumulation: micro-batches a step.
        learning_rate: peak learning rate. warmup_steps: steps of linear warm-up.
        schedule: of the learning rate, a name of transformers. weight_decay: weight decay.
        optimizer: a name of transformers' `optim`. max_grad_norm: gradient clipping; 0 is off.
        precision: fp32, bf16 or fp16. gradient_checkpointing: recompute activations in the backward pass.
        seed: seed of weights, data order and split. threads: CPU threads; without it, torch's.
        fsdp: processes that see different tokens and share the parameters (FSDP2); without it, all that `tp` leaves.
        ep: processes that share the experts of a layer (expert parallelism).
        tp: processes that share the matrices (tensor parallelism); on GPUs.
        balance: none, mixtral or deepseek_v3 (auxiliary losses), bias (no loss; routers with a selection bias).
        balance_strength: coefficient of the loss, or update rate of the bias; without it, the method's.
        no_prune: watch the loads, prune nothing.
        prune: the prunings of a schedule, each in words, such as ["stable alpha=0.2", "step=400 alpha=0.4"].
        uniform: keep one expert count for all layers. prune_at_step: prune after this step, stable or not.
        prune_at_tokens: prune at the end of the window in which this many tokens are reached.
        multiple_of: kept counts are multiples of it, e.g. the expert-parallel size.
        min_experts: keep at least this many a layer. max_experts: keep at most this many a layer.
        no_rearrange: keep the experts in their order; without it they are levelled over the `ep` ranks at every
            pruning.
        rearrange_ranks: level the experts over this many ranks; without it, `ep`.
        rearrange_every: also between prunings, about every this many steps, as loads drift.
        rearrange_method: how to place: swaps, greedy (LAEP's) or exact (small cases).
        rearrange_nodes: nodes whose ranks are filled together.
        rearrange_tolerance: between prunings, move as few experts as keep the balance within this share of the best
            found.
        window_steps: steps a statistics window. max_regret: loads are stable when the idlest experts of now are
            expected to carry at most this share of the tokens more than the idlest ones at the end of the run.
        max_noise: and when sampling alone makes at most this share. min_change: and when at least this share goes to
            other experts than in the first window; by default 0.1, with `model` 0. min_windows: and not before so many
            windows. log_steps: steps between log lines.
        eval_steps: steps between validations. save_steps: steps between checkpoints.
        report_to: loggers of transformers: tensorboard, wandb, trackio, ... or none.
        control: also train without pruning, for the report to compare with.
        checkpoint_on_sigterm: hold SIGTERM, which schedulers send before they kill, until the step is done and its
            checkpoint written; then the signal takes its course. Of the main thread, and while steps are made.
        resume: go on with the run in `out`, with its own settings; those that are given must be the same.
        dry_run: say what the run would be and what memory it takes; write nothing.
        on_progress: called with the stages of making the data, then after every step with ("pretrain", steps done,
            steps in all); the newest numbers stand behind a comma, "pretrain, loss 1.234", and what happened behind a
            colon, "pretrain: step 20: validation loss 2.345". The control run is "control". A number in all that is
            not known is 0.
        rule: the options of one pruning rule, `target_params=0.67` without any; see `Rule`.

    Returns:
        The model, the report, the plan, and what happened at which step.

    Raises:
        SecateurError: bad input; found before training wherever it can be, and then `out` is left as it was.
        OSError: the disk refused a write; what is on it stays whole and `resume` goes on from there.
        TypeError: an option that no rule has.

    Example:
        >>> run = secateur.pretrain("run", preset="olmoe", data=["code=src/", "books/*.txt"], target_params=0.67)
        >>> run.events[0]["experts_after"]
        640
    """
    check_given(pretrain, locals())
    given = _given(locals())
    check_names(rule)
    folder = RunFolder(Path(out))
    if dry_run and resume:
        raise SecateurError("--dry-run is for a new run, --resume for one that was started; give one of them")
    if dry_run:
        from secateur.pretraining.preflight import plan_of_run

        return _result(folder, plan_of_run(PretrainOptions(**given)), plan=None)

    from secateur.pretraining import run

    how: Any = {"checkpoint_on_sigterm": checkpoint_on_sigterm, "on_progress": on_progress}
    if resume:
        _check_same(folder, given)
        devices = {name: given[name] for name in DEVICES if name in given}
        report = run.resume(folder.path, devices=devices, **how)
    else:
        report = run.run_pretraining(PretrainOptions(**given), folder.path, **how)
    return _result(folder, report, plan=Plan.load(folder.plan) if folder.plan.is_file() else None)


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the call gave, by the names of `PretrainOptions`."""
    named = {"overrides": arguments["set"] or {}, **arguments, **arguments["rule"]}
    named |= {name: tuple(as_texts(named[name])) for name in ("data", "prune")}
    named |= {name: named[name] and os.fspath(named[name]) for name in ("config", "model", "tokenizer")}
    names = {"overrides" if name == "set" else name for name in GIVEN.get() if arguments.get(name, ()) is not None}
    return {one.name: named[one.name] for one in fields(PretrainOptions) if one.name in names}


def _check_same(folder: RunFolder, given: Mapping[str, Any]) -> None:
    saved = folder.read_options()
    for name, value in given.items():
        if name not in DEVICES and getattr(saved, name) != value:
            raise SecateurError(
                f"--resume: {option(name)} is {value!r}, but the run in {folder.path} was started with "
                f"{getattr(saved, name)!r}; leave it out, or start a new run"
            )


def _result(folder: RunFolder, content: Mapping[str, Any], *, plan: Plan | None) -> Pretrained:
    return Pretrained(
        out=folder.path,
        model=folder.model,
        page=folder.path / "report.html",
        plan=plan,
        events=tuple(content.get("events", ())),
        validation_loss=content.get("validation_loss"),
        content=content,
    )
