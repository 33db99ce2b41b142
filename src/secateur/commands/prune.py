"""`secateur prune`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secateur.commands import choice as options
from secateur.commands.calibration_options import (
    BatchSize,
    Data,
    Device,
    Pack,
    Samples,
    SequenceLength,
    Split,
    TextKey,
    device_named,
)
from secateur.commands.layers_bar import layers_bar
from secateur.commands.observe import Activations
from secateur.commands.plan import outcome_lines
from secateur.commands.progress import bytes_bar
from secateur.commands.verify import WORDS
from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.checkpoint.survey import Survey


def prune(
    model: Annotated[Path, typer.Argument(help="The folder of a Hugging Face model; it is only read.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must be new or empty.")],
    keep: options.Keep = None,
    criterion: options.Criterion = None,
    pretrained: options.Pretrained = None,
    data: Data = None,
    samples: Samples = 128,
    sequence_length: SequenceLength = 512,
    batch_size: BatchSize = 8,
    pack: Pack = True,
    text_key: TextKey = "text",
    split: Split = "train",
    activations: Annotated[
        Activations, typer.Option("--activations", help="Where they wait between layers, see `secateur observe`.")
    ] = Activations.auto,
    device: Device = "auto",
    allocation: options.Allocation = "uniform",
    expert_parallel: options.ExpertParallel = 1,
    min_experts: options.MinExperts = 1,
    seed: Annotated[int, typer.Option("--seed", help="Of the choice of text, and of the criterion random.")] = 0,
    protect: options.Protect = None,
    alpha: options.Alpha = None,
    beta: options.Beta = None,
    target_params: options.TargetParams = None,
    max_rerouted: options.MaxRerouted = None,
    undo: Annotated[
        Path | None, typer.Option("--undo", help="Keep the dropped experts in this new folder, to restore the source.")
    ] = None,
    mtp: Annotated[
        str | None,
        typer.Option("--mtp", help="What becomes of layers that predict further tokens: whole (as they are) or drop."),
    ] = None,
    verify_tokens: Annotated[
        int,
        typer.Option(
            "--verify-tokens", help="Length of the sample that both models are run on at the end; 0 loads neither."
        ),
    ] = 32,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an interrupted pruning left.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Make a smaller model of a model: observe it on data, plan, apply the plan, verify what was written.

    Without `--criterion` it is reap, which runs the model on text; without `--data` that is Python's own standard
    library. aimer, weight_norm, router_row_norm and random need no text. With `--pretrained` it is router_norm_change,
    which needs none either: the experts go whose router rows fine-tuning lengthened least. After a kill the same
    command goes on where it was. The result is checked before it gets its name.

    Example: `secateur prune models/Qwen3-30B-A3B --keep 0.75 --data calibration.jsonl --out pruned`
    """

    from secateur.checkpoint import prune as program

    has_rule = any(value is not None for value in (alpha, beta, target_params, max_rerouted))
    choice = options.choice_of(
        criterion or ("laep" if has_rule else "reap" if pretrained is None else "router_norm_change"),
        keep=keep,
        alpha=alpha,
        beta=beta,
        target_params=target_params,
        max_rerouted=max_rerouted,
        allocation=allocation,
        expert_parallel=expert_parallel,
        min_experts=min_experts,
        seed=seed,
        protect=protect,
    )
    if data and not choice.needs_data:
        raise SecateurError(f"--data: criterion {choice.criterion!r} needs no text here; leave it out")
    show = not (quiet or as_json)

    def observe(found: Survey, stats: Path) -> tuple[dict[str, Any], Callable[[], object]]:
        from secateur.checkpoint.observe import Run
        from secateur.data.calibration import calibrate
        from secateur.data.tokenizer import load_tokenizer

        drawn = calibrate(
            load_tokenizer(model),
            data or [],
            samples=samples,
            sequence_length=sequence_length,
            seed=seed,
            pack=pack,
            text_key=text_key,
            split=split,
        )
        ready = Run(
            found, drawn, stats, batch_size=batch_size, activations=activations.value, device=device_named(device)
        )

        def take() -> None:
            with layers_bar("observing", num_batches=-(-samples // batch_size), show=show) as on_step:
                ready.observe(on_step=on_step)

        return drawn.to_json() | {"batch_size": batch_size}, take

    with _bars(show=show) as on_progress:
        result = program.prune(
            model,
            out,
            choice,
            pretrained=pretrained,
            restart=restart,
            observe=observe,
            undo=undo,
            mtp=mtp,
            verify_tokens=verify_tokens,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    if as_json:
        print(json.dumps(result, indent=2))
    elif not quiet:
        print("\n".join(_lines(result, out, dry_run)))


@contextlib.contextmanager
def _bars(*, show: bool) -> Iterator[Callable[[str, int, int], None]]:
    """One bar a stage, each gone when the next begins."""
    with contextlib.ExitStack() as now:
        stage: list[Any] = ["", None]

        def on_progress(name: str, done: int, total: int) -> None:
            if name != stage[0]:
                now.close()
                stage[:] = [name, now.enter_context(bytes_bar(name, show=show))]
            stage[1](done, total)

        yield on_progress


def _lines(result: dict[str, Any], out: Path, dry_run: bool) -> list[str]:
    lines = [f"{'would write' if dry_run else 'wrote'} {out}"]
    if result["outcome"] is None:
        return [*lines, "how many experts each layer keeps is decided by the data"]
    lines += outcome_lines(result["outcome"])
    if dry_run and result["report"] is None:
        lines.append("which experts go is decided by the data")
    for check in result.get("verified", {}).get("checks", ()):
        lines.append(f"{WORDS[check['passed']]}: {check['claim']} ({check['detail']})")
    return lines
