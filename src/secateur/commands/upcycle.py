"""`secateur upcycle`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.commands.bars import stage_bars
from secateur.commands.shown import show
from secateur.files.new_folder import IS_THERE


def upcycle(
    parents: Annotated[
        list[Path], typer.Argument(help="Folders of dense models; the first is the seed and expert 0. Only read.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must be new or empty.")],
    form: Annotated[
        str,
        typer.Option(
            "--form",
            help="btx: every parent's FFN is an expert, the rest is averaged (2403.07816). bam: attention too "
            "(2408.08274). copy: copies of one FFN (2212.05055). split: the neurons of one FFN, divided.",
        ),
    ] = "btx",
    target: Annotated[
        str | None, typer.Option("--target", help="Model type of the result, where several fit; else the usual one.")
    ] = None,
    experts: Annotated[
        int | None, typer.Option("--experts", min=1, help="Of copy: copies of the FFN. Of split: its parts.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Experts of a token; if not given 2 whole FFNs, of bam 1.")
    ] = None,
    granularity: Annotated[
        int, typer.Option("--granularity", min=1, help="Cut every FFN into so many experts; --top-k is a multiple.")
    ] = 1,
    attention_from: Annotated[
        int | None,
        typer.Option("--attention-from", min=0, help="Of btx: take all but the FFNs from this parent; no average."),
    ] = None,
    kv: Annotated[
        str,
        typer.Option("--kv", help="Of bam: keys and values of each expert (experts), or averaged for all (shared)."),
    ] = "experts",
    attention_top_k: Annotated[
        int | None,
        typer.Option("--attention-top-k", min=1, help="Of bam: mix so many attention experts of a token; else all."),
    ] = None,
    renormalise: Annotated[
        bool | None,
        typer.Option(
            "--renormalise/--no-renormalise",
            help="Whether the chosen experts' weights are divided by their sum; btx, copy: yes, bam, split: no.",
        ),
    ] = None,
    noise: Annotated[
        float, typer.Option("--noise", min=0, help="Of copy: noise on every copy, as a share of its tensor's RMS.")
    ] = 0.0,
    division: Annotated[
        str,
        typer.Option(
            "--division", help="Of split: order, kmeans (balanced, of the gate's rows), or coactivation (on text)."
        ),
    ] = "order",
    shared_neurons: Annotated[
        int,
        typer.Option("--shared-neurons", min=0, help="Of split: so many of the busiest neurons are a shared expert."),
    ] = 0,
    router: Annotated[
        str | None,
        typer.Option("--router", help="How it starts: random, norm (default of split), hidden, or ridge (2603.29765)."),
    ] = None,
    router_std: Annotated[float, typer.Option("--router-std", min=0, help="Spread of a random router.")] = 0.02,
    router_data: Annotated[
        list[str] | None,
        typer.Option("--router-data", help="domain=FILE, one for each parent in their order; of split any text."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Sequences of each domain.")] = 16,
    sequence_length: Annotated[int, typer.Option("--sequence-length", min=2, help="Tokens of a sequence.")] = 256,
    text: Annotated[
        Path | None, typer.Option("--text", help="Compare the result with every parent on this text; loads them all.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of all that is drawn.")] = 0,
    allow_unrelated: Annotated[
        bool, typer.Option("--allow-unrelated", help="Average parents that are no children of one seed all the same.")
    ] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Throw away what an interrupted start left.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and say what would be done; write nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Grow a Mixture-of-Experts from dense models.

    The result is a stock architecture: Llama and Mistral become Mixtral, Qwen2 and Qwen3 their own mixtures, a divided
    Llama Qwen2-MoE. `--form bam` gives a BAM, a model class of Secateur. Tensors are read one at a time. After a kill
    the same command goes on where it was.
    `secateur verify A B C DIR` proves which tensor came from where.

    Example: `secateur upcycle seed code law --out grown --text held-out.txt`
    """
    from secateur.model_folder.read.collector import collector_at_rest

    with collector_at_rest():
        from secateur.upcycling.upcycle import upcycle as function
    from secateur.upcycling.record import report_lines

    with stage_bars(show=not (quiet or as_json or dry_run)) as on_progress:
        result = function(
            parents,
            out,
            form=form,  # type: ignore[arg-type]  # other values are refused by name
            target=target,
            experts=experts,
            top_k=top_k,
            granularity=granularity,
            attention_from=attention_from,
            kv=kv,  # type: ignore[arg-type]
            attention_top_k=attention_top_k,
            renormalise=renormalise,
            noise=noise,
            division=division,  # type: ignore[arg-type]
            shared_neurons=shared_neurons,
            router=router,  # type: ignore[arg-type]
            router_std=router_std,
            router_data=router_data,
            samples=samples,
            sequence_length=sequence_length,
            text=text,
            seed=seed,
            allow_unrelated=allow_unrelated,
            restart=restart,
            dry_run=dry_run,
            on_progress=on_progress,
        )
    report = result.to_json()
    did = f"{'would write' if dry_run else 'wrote'} {out}"
    if IS_THERE in report:
        did = f"{out} is there already, as this command writes it; nothing was written"
    show(result, "\n".join([did, *report_lines(report)]), as_json=as_json, quiet=quiet)
