"""`secateur finetune`."""

# ruff: noqa: E501 - one option a line reads as a table

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.commands.bars import run_bars
from secateur.commands.shown import show

DATA, TRAINING, MODEL, RECORD = "Data", "Training", "Model", "Record"


def _option(help: str, panel: str, *names: str) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel)


def finetune(
    model: Annotated[Path, typer.Argument(help="The folder of a Hugging Face model, pruned or not; it is only read.")],
    out: Annotated[Path, _option("The folder to write; it must be new or empty.", RECORD, "--out")],
    data: Annotated[list[str] | None, _option("Text: a file, a folder, a glob, .jsonl with chat messages, or hf:NAME, after domain= if it shall count as that; repeatable. Images: a folder with one subfolder a class, or an .npz with images and labels.", DATA, "--data")] = None,
    eval_data: Annotated[list[str] | None, _option("The same, to measure before, during and after.", DATA, "--eval-data")] = None,
    text_key: Annotated[str, _option("Where the text is in .jsonl, .parquet, hf:.", DATA)] = "text",
    split: Annotated[str, _option("The split of an hf: dataset.", DATA)] = "train",
    sequence_length: Annotated[int | None, _option("Tokens of a sequence. Default: 512, or what the model can take.", DATA)] = None,
    augment: Annotated[bool, _option("Move images by up to an eighth of their sides, and flip every second one.", DATA, "--augment")] = False,
    steps: Annotated[int | None, _option("Optimizer steps. Default: one epoch.", TRAINING)] = None,
    epochs: Annotated[float | None, _option("Passes over the data, in place of --steps.", TRAINING)] = None,
    batch_size: Annotated[int, _option("Sequences or images a micro-batch.", TRAINING)] = 8,
    gradient_accumulation: Annotated[int, _option("Micro-batches a step.", TRAINING)] = 1,
    optimizer: Annotated[str, _option("adamw, or sgd with a momentum of 0.9.", TRAINING)] = "adamw",
    learning_rate: Annotated[float, _option("Peak learning rate.", TRAINING)] = 2e-5,
    schedule: Annotated[str, _option("Of the learning rate after warm-up: cosine, linear or constant.", TRAINING)] = "cosine",
    warmup: Annotated[float, _option("Linear warm-up: below 1 a share of the steps, from 1 on a number of steps.", TRAINING)] = 0.03,
    weight_decay: Annotated[float, _option("Weight decay.", TRAINING)] = 0.0,
    max_grad_norm: Annotated[float, _option("Gradient clipping; 0 is off.", TRAINING)] = 1.0,
    bf16: Annotated[bool, _option("Compute in bfloat16; weights and optimizer stay in float32.", TRAINING, "--bf16")] = False,
    seed: Annotated[int, _option("Of the order of the data, and of all that is random in training.", TRAINING)] = 0,
    freeze: Annotated[list[str] | None, _option("Leave parameters as they are in whose name this regular expression is found, such as 'mlp.gate.weight'. Repeatable.", MODEL, "--freeze")] = None,
    router_aux_loss: Annotated[float | None, _option("Weight of a loss that balances the experts, 0 for none. Default: what the model's config says.", MODEL)] = None,
    new_head: Annotated[bool, _option("Give an image model a new classifier for the classes of the data.", MODEL, "--new-head")] = False,
    log_steps: Annotated[int, _option("Steps between recorded losses.", RECORD)] = 10,
    eval_steps: Annotated[int | None, _option("Steps between measurements on --eval-data. Default: before and after only.", RECORD)] = None,
    save_steps: Annotated[int, _option("Steps between checkpoints, which --resume goes on from; 0 for none.", RECORD)] = 500,
    report_to: Annotated[str, _option("Loggers of transformers: tensorboard, wandb, trackio, ... or none.", RECORD)] = "none",
    checkpoint_on_sigterm: Annotated[bool, _option("At SIGTERM, which schedulers send before they kill: finish the step, write a checkpoint, then leave.", RECORD)] = True,
    resume: Annotated[bool, _option("Go on with a killed run of the same settings.", RECORD, "--resume")] = False,
    restart: Annotated[bool, _option("Throw away what a killed run left.", RECORD, "--restart")] = False,
    dry_run: Annotated[bool, _option("Check everything and say what would be done.", RECORD, "--dry-run")] = False,
    as_json: Annotated[bool, _option("Print the result as JSON.", RECORD, "--json")] = False,
    quiet: Annotated[bool, _option("Print nothing but errors.", RECORD, "--quiet")] = False,
) -> None:  # fmt: skip
    """Fine-tune a model, pruned or not, on text or images, and write a model folder of the same kind.

    Its experts, tokenizer and other files are those of the source. Text is joined and cut into sequences, and the loss
    is on every token; chats go through the chat template.

    Example: `secateur finetune pruned --data chats.jsonl --eval-data held-out.jsonl --epochs 2 --out tuned`
    """
    from secateur.finetuning.finetune import finetune as function

    with run_bars(quiet=quiet or as_json) as on_progress:
        result = function(
            model,
            out,
            data=data,
            eval_data=eval_data,
            text_key=text_key,
            split=split,
            sequence_length=sequence_length,
            augment=augment,
            steps=steps,
            epochs=epochs,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            optimizer=optimizer,  # type: ignore[arg-type]  # another one is refused by name
            learning_rate=learning_rate,
            schedule=schedule,  # type: ignore[arg-type]
            warmup=warmup,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            bf16=bf16,
            seed=seed,
            freeze=freeze,
            router_aux_loss=router_aux_loss,
            new_head=new_head,
            log_steps=log_steps,
            eval_steps=eval_steps,
            save_steps=save_steps,
            report_to=report_to,
            checkpoint_on_sigterm=checkpoint_on_sigterm,
            resume=resume,
            restart=restart,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    show(result, "\n".join(_lines(result.to_json(), out, dry_run)), as_json=as_json, quiet=quiet)


def _lines(result: dict[str, Any], out: Path, dry_run: bool) -> list[str]:
    trained, parameters = result["trained_parameters"], result["parameters"]
    lines = [
        f"{'would write' if dry_run else 'wrote'} {out}: {result['steps']:,} steps, {result['epochs']:.3g} epochs, "
        f"{trained:,} of {parameters:,} parameters trained"
    ]
    if result["router_aux_loss"]:
        weights = ", ".join(f"{name} {value}" for name, value in result["router_aux_loss"].items())
        lines.append(f"loss of the routers: {weights}")
    if dry_run:
        return lines
    recorded = [line["loss"] for line in result["losses"]]
    lines.append("training loss " + " -> ".join(f"{loss:.4f}" for loss in dict.fromkeys((recorded[0], recorded[-1]))))
    if measured := result["evaluations"]:
        for key in ("loss", "accuracy"):
            if key in measured[0]:
                lines.append(f"{key} on --eval-data {measured[0][key]:.4f} -> {measured[-1][key]:.4f}")
    return lines
