"""`secateur pretrain`."""

# ruff: noqa: E501 - one option a line reads as a table

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.bars import run_bars
from secateur.commands.rule_options import help_for_training, with_rule_options
from secateur.commands.shown import show
from secateur.errors import SecateurError
from secateur.files.json import parse_json

# options that say how the result is shown
SHOWING = ("as_json", "quiet")

MODEL, DATA, TRAINING, DEVICE, BALANCE, PRUNING, PLACEMENT, RECORD = (
    "Model",
    "Data",
    "Training",
    "Devices (torchrun)",
    "Balance",
    "Pruning (LAEP)",
    "Rearrangement over expert-parallel ranks",
    "Record",
)


def _option(help: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


@with_rule_options(after="prune", help=help_for_training, panel=PRUNING)
def pretrain(
    context: typer.Context,
    out: Annotated[Path, _option("Folder of the run: new or empty, or with --resume an earlier run.", RECORD)],
    preset: Annotated[str | None, _option("A small model: qwen3_moe (default), olmoe, mixtral, deepseek_v3, gpt_oss, qwen3_next.", MODEL)] = None,
    config: Annotated[str | None, _option("A transformers config.json of any MoE causal LM; random weights.", MODEL)] = None,
    model: Annotated[str | None, _option("A folder with a model whose pre-training goes on.", MODEL)] = None,
    set: Annotated[list[str] | None, _option("Change a config field, e.g. --set num_hidden_layers=8. Repeatable.", MODEL, "--set")] = None,
    data: Annotated[list[str] | None, _option("File, folder or glob of .txt .md .py .jsonl .parquet, or hf:NAME for a datasets name; NAME=... names the domain. Repeatable. Default: this Python's standard library and reference prose.", DATA)] = None,
    text_key: Annotated[str, _option("Key or column of the text in .jsonl, .parquet and datasets.", DATA)] = "text",
    tokenizer: Annotated[str | None, _option("Folder of a tokenizer. Default: a byte-level BPE trained on the data.", DATA)] = None,
    vocab_size: Annotated[int, _option("Size of the tokenizer that is trained.", DATA)] = 4096,
    sequence_length: Annotated[int, _option("Tokens a sequence.", DATA)] = 256,
    validation_share: Annotated[float, _option("Share of the documents kept for validation.", DATA)] = 0.02,
    max_data_bytes: Annotated[int | None, _option("Use at most this much training text.", DATA)] = None,
    steps: Annotated[int, _option("Optimizer steps.", TRAINING)] = 600,
    batch_size: Annotated[int, _option("Sequences a micro-batch, over all processes.", TRAINING)] = 8,
    accumulation: Annotated[int, _option("Micro-batches a step.", TRAINING)] = 1,
    learning_rate: Annotated[float, _option("Peak learning rate.", TRAINING)] = 2e-3,
    warmup_steps: Annotated[int, _option("Steps of linear warm-up.", TRAINING)] = 20,
    schedule: Annotated[str, _option("Learning-rate schedule, a name of transformers.", TRAINING)] = "cosine",
    weight_decay: Annotated[float, _option("Weight decay.", TRAINING)] = 0.1,
    optimizer: Annotated[str, _option("Optimizer, a name of transformers' `optim`.", TRAINING)] = "adamw_torch",
    max_grad_norm: Annotated[float, _option("Gradient clipping; 0 is off.", TRAINING)] = 1.0,
    precision: Annotated[str, _option("fp32, bf16 or fp16.", TRAINING)] = "fp32",
    gradient_checkpointing: Annotated[bool, _option("Recompute activations in the backward pass.", TRAINING)] = False,
    seed: Annotated[int, _option("Seed of weights, data order and split.", TRAINING)] = 0,
    threads: Annotated[int | None, _option("CPU threads. Default: torch's.", TRAINING)] = None,
    fsdp: Annotated[int | None, _option("Processes that see different tokens and share the parameters (FSDP2). Default: all that --tp leaves.", DEVICE)] = None,
    ep: Annotated[int, _option("Processes that share the experts of a layer (expert parallelism).", DEVICE)] = 1,
    tp: Annotated[int, _option("Processes that share the matrices (tensor parallelism); on GPUs.", DEVICE)] = 1,
    balance: Annotated[str, _option("none, mixtral or deepseek_v3 (auxiliary losses), bias (no loss; routers with a selection bias).", BALANCE)] = "none",
    balance_strength: Annotated[float | None, _option("Coefficient of the loss, or update rate of the bias. Default: the method's.", BALANCE)] = None,
    no_prune: Annotated[bool, _option("Watch the loads, prune nothing.", PRUNING)] = False,
    prune: Annotated[list[str] | None, _option("One pruning of a schedule, e.g. --prune 'stable alpha=0.2' --prune 'step=400 alpha=0.4'. Repeatable.", PRUNING)] = None,
    uniform: Annotated[bool, _option("Keep one expert count for all layers.", PRUNING)] = False,
    prune_at_step: Annotated[int | None, _option("Prune after this step, stable or not.", PRUNING)] = None,
    prune_at_tokens: Annotated[int | None, _option("Prune at the end of the window in which this many tokens are reached.", PRUNING)] = None,
    multiple_of: Annotated[int, _option("Kept counts are multiples of it, e.g. the expert-parallel size.", PRUNING)] = 1,
    min_experts: Annotated[int, _option("Keep at least this many a layer.", PRUNING)] = 1,
    max_experts: Annotated[int | None, _option("Keep at most this many a layer.", PRUNING)] = None,
    no_rearrange: Annotated[bool, _option("Keep the experts in their order. Default: level them over the --ep ranks at every pruning.", PLACEMENT)] = False,
    rearrange_ranks: Annotated[int | None, _option("Level the experts over this many ranks. Default: --ep.", PLACEMENT)] = None,
    rearrange_every: Annotated[int | None, _option("Also between prunings, about every this many steps, as loads drift.", PLACEMENT)] = None,
    rearrange_method: Annotated[str, _option("How to place: swaps, greedy (LAEP's) or exact (small cases).", PLACEMENT)] = "swaps",
    rearrange_nodes: Annotated[int, _option("Nodes whose ranks are filled together.", PLACEMENT)] = 1,
    rearrange_tolerance: Annotated[float | None, _option("Between prunings, move as few experts as keep the balance within this share of the best found.", PLACEMENT)] = None,
    window_steps: Annotated[int, _option("Steps a statistics window.", PRUNING)] = 20,
    max_regret: Annotated[float, _option("Loads are stable when the idlest experts of now are expected to carry at most this share of the tokens more than the idlest ones at the end of the run.", PRUNING)] = 0.025,
    max_noise: Annotated[float, _option("And when sampling alone makes at most this share.", PRUNING)] = 0.005,
    min_change: Annotated[float | None, _option("And when at least this share of the tokens goes to other experts than in the first window. Default: 0.1; 0 with --model.", PRUNING)] = None,
    min_windows: Annotated[int, _option("And not before so many windows.", PRUNING)] = 16,
    log_steps: Annotated[int, _option("Steps between log lines.", RECORD)] = 10,
    eval_steps: Annotated[int, _option("Steps between validations.", RECORD)] = 100,
    save_steps: Annotated[int, _option("Steps between checkpoints.", RECORD)] = 200,
    report_to: Annotated[str, _option("Loggers of transformers: tensorboard, wandb, trackio, ... or none.", RECORD)] = "none",
    control: Annotated[bool, _option("Also train without pruning, for the report to compare with.", RECORD)] = False,
    checkpoint_on_sigterm: Annotated[bool, _option("At SIGTERM, which schedulers send before they kill: finish the step, write a checkpoint, then leave.", RECORD)] = True,
    resume: Annotated[bool, _option("Go on with the run in --out, with its own settings.", RECORD)] = False,
    dry_run: Annotated[bool, _option("Print the plan of the run and its memory, and leave.", RECORD)] = False,
    as_json: Annotated[bool, _option("Print the result as JSON on standard output.", RECORD, "--json")] = False,
    quiet: Annotated[bool, _option("No progress.", RECORD)] = False,
    **rule: Any,
) -> None:  # fmt: skip
    """Pre-train a Mixture-of-Experts language model that prunes its own experts (LAEP, arXiv 2601.14327).

    On several devices: `torchrun --nproc-per-node 4 -m secateur pretrain --out run --ep 4`

    Example: `secateur pretrain --out run --preset olmoe --data code=src/ --data books/*.txt --target-params 0.67`
    """
    settings = {
        name: value
        for name, value in context.params.items()
        if name not in SHOWING and getattr(context.get_parameter_source(name), "name", "DEFAULT") != "DEFAULT"
    }
    if set:
        settings["set"] = dict(_field(text) for text in set)

    from secateur.pretraining.pretrain import pretrain as function
    from secateur.train.distributed.launch import is_main, leave

    with run_bars(quiet=quiet or not is_main()) as on_progress:
        result = function(**settings, on_progress=on_progress)
    must_speak = is_main()
    if not dry_run:
        leave()
    if must_speak:
        words = _planned(result.to_json()) if dry_run else _done(out, result.to_json())
        show(result, words, as_json=as_json, quiet=False, indent=1)


def _field(text: str) -> tuple[str, Any]:
    """A --set argument: the value is JSON where it can be read as JSON, else the text itself."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise SecateurError(f"--set {text!r}: expected field=value")
    try:
        return key, parse_json(value, f"--set {key}")
    except SecateurError:
        return key, value


def _planned(plan: dict[str, Any]) -> str:
    model, training, memory = plan["model"], plan["training"], plan["memory_bytes"]
    counts = sorted(set(model["experts"].values()))
    lines = [
        f"model      {model['model_type']}, {model['attention']} attention, {model['layers']} layers, "
        f"{'/'.join(map(str, counts))} experts in {len(model['experts'])} of them, top-{model['top_k']}",
        f"parameters {model['parameters']:,}, of them {model['expert_parameters']:,} in experts and their router rows",
        f"data       {', '.join(plan['data']['sources'])}",
        f"training   {training['steps']:,} steps x {training['tokens_per_step']:,} tokens = {training['tokens']:,} "
        f"tokens on {training['device']}, {training['checkpoints']} checkpoints"
        + (", then a control run without pruning" if training["control_run"] else ""),
        f"memory     {_mebibytes(memory)} (activations not included)",
    ]
    devices = plan["devices"]
    if devices["processes"] > 1:
        lines.append(
            f"devices    {devices['processes']} processes: fsdp {devices['fsdp']}, ep {devices['ep']}, "
            f"tp {devices['tp']}; each {_mebibytes(plan['memory_bytes_per_process'])} and one layer at a time"
        )
    for pruning in plan["prunings"]:
        rule = ", ".join(f"{key} {value}" for key, value in pruning["rule"].items() if value is not False)
        lines.append(f"pruning    at {pruning['when']}: {rule}")
    if not plan["prunings"]:
        lines.append("pruning    none")
    return "\n".join(lines)


def _mebibytes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size / 2**20:,.1f} MiB" for name, size in sizes.items())


def _done(out: Path, report: dict[str, Any]) -> str:
    lines = []
    prunings = [event for event in report["events"] if event["reason"] != "rearrange"]
    for event in prunings:
        saved = 1 - event["parameters_after"] / event["parameters_before"]
        lines.append(
            f"step {event['step']}: {event['experts_before']} -> {event['experts_after']} experts, "
            f"{event['parameters_before']:,} -> {event['parameters_after']:,} parameters (-{saved:.1%})"
        )
    if not prunings:
        lines.append("no pruning took place")
    if unpruned := report["unpruned"]:
        experts = sum(map(len, (unpruned["dropped"] or {}).values()))
        lines.append(f"the next pruning did not come: {unpruned['waits_for']}; it would have dropped {experts} experts")
    if moves := len(report["events"]) - len(prunings):
        lines.append(f"experts rearranged {moves} more times")
    lines.append(f"validation loss {report['validation_loss']:.4f}")
    speed = report["tokens_per_second"]
    if speed["before"] and speed["after"]:
        times = speed["after"] / speed["before"]
        lines.append(f"tokens/s {speed['before']:,.0f} before, {speed['after']:,.0f} after ({times:.2f}x)")
    return "\n".join([*lines, f"model  {out / 'model'}", f"report {out / 'report.html'}"])
