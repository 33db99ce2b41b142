"""Grow a Mixture-of-Experts from dense models, into a new folder: all of it, or nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from secateur.errors import SecateurError
from secateur.files.atomic import atomic_write
from secateur.files.given import StrPath, StrPaths, as_texts, check_given
from secateur.files.json import read_object
from secateur.files.kept import Kept
from secateur.files.new_folder import IS_THERE, check_apart, is_occupied, occupied, written_beside
from secateur.files.progress import OnStage, stage
from secateur.files.work_folder import Work, as_noted, differing, place_of_work, work_folder
from secateur.results import Written
from secateur.upcycling.forms import Blueprint, blueprint, check_form
from secateur.upcycling.layouts import layout_of
from secateur.upcycling.options import Asked
from secateur.upcycling.parents import Parents, read_parents
from secateur.upcycling.record import CARD, RECORD, REPORT, card, describe
from secateur.upcycling.starts import STARTS

WORK = "upcycling"


@dataclass(frozen=True, kw_only=True)
class Upcycled(Written):
    """What `upcycle` wrote, or of a dry run would write; `to_json` is what report.json says.

    Args:
        out: the new folder. model_type: of the mixture. experts: of each layer. top_k: experts of a token.
        num_bytes: of all tensors. comparison: with every parent on `text`, as JSON; None without a text.
    """

    model_type: str
    experts: int
    top_k: int
    num_bytes: int
    comparison: dict[str, Any] | None


def upcycle(
    parents: StrPaths,
    out: StrPath,
    *,
    form: Literal["btx", "bam", "copy", "split"] = "btx",
    target: str | None = None,
    experts: int | None = None,
    top_k: int | None = None,
    granularity: int = 1,
    attention_from: int | None = None,
    kv: Literal["experts", "shared"] = "experts",
    attention_top_k: int | None = None,
    renormalise: bool | None = None,
    noise: float = 0.0,
    division: Literal["order", "kmeans", "coactivation"] = "order",
    shared_neurons: int = 0,
    router: Literal["random", "norm", "hidden", "ridge"] | None = None,
    router_std: float = 0.02,
    router_data: StrPaths | None = None,
    samples: int = 16,
    sequence_length: int = 256,
    text: StrPath | None = None,
    seed: int = 0,
    allow_unrelated: bool = False,
    restart: bool = False,
    dry_run: bool = False,
    on_progress: OnStage | None = None,
) -> Upcycled:
    """Grow a Mixture-of-Experts from dense models.

    The result is a stock architecture: Llama and Mistral become Mixtral, Qwen2 and Qwen3 their own mixtures, a divided
    Llama Qwen2-MoE; of the form bam it is a BAM, a class of ours. Tensors are read one at a time. After a kill the same
    call goes on where it was.

    Args:
        parents: folders of dense models; the first is the seed and expert 0.
        out: the folder to write; it must be new or empty.
        form: btx (every parent's FFN is an expert, the rest is averaged, 2403.07816), bam (attention too, 2408.08274),
            copy (copies of one FFN, 2212.05055; with granularity 2410.07524), split (its neurons are divided).
        target: the model type of the result, where several fit; without it the usual one.
        experts: of a layer: of copy the copies of the whole FFN, of split the parts.
        top_k: experts of a token; without it 2 whole FFNs, of bam 1. Of split it must be given.
        granularity: cut every FFN into so many experts by the same neurons; top_k must be a multiple.
        attention_from: of btx: the number of the parent that all but the experts is taken from, instead of the mean.
        kv: of bam: keys and values of each attention expert, or averaged ones that all share.
        attention_top_k: of bam: mix so many attention experts of a token, instead of all.
        renormalise: whether the weights of the chosen experts are divided by their sum, where the architecture leaves
            that open; without it of btx and copy yes, of bam and split no.
        noise: of copy: normal noise on every copy, relative to the root mean square of the tensor.
        division: of split, how neurons are divided: order, kmeans (of gate rows), coactivation (on text).
        shared_neurons: of split: so many neurons that are busy most often form a shared expert.
        router: how it begins: random, norm (the default of split), hidden, ridge.
        router_std: of random.
        router_data: text for what is measured: one for each parent in their order, as domain=FILE; of split any.
        samples: sequences of each domain. sequence_length: tokens of one.
        text: a file; the result is compared with every parent on it, which loads each of them.
        seed: of all that is drawn.
        allow_unrelated: average weights that are no children of one seed all the same.
        restart: throw away what an interrupted start left.
        dry_run: check everything and say what would be done; write nothing.
        on_progress: called with ("looking at layers" | "dividing" | ..., done, in all), then with ("writing", bytes
            written, bytes to write), then with ("comparing models", models run, in all).

    Returns:
        The shape of the mixture and how far it is from its parents. Where the result is there already, "is_there" is in
        `to_json()`.

    Raises:
        SecateurError: the parents or the options do not fit, `out` is not free, or a parent was changed meanwhile.
        OSError: the disk refused; nothing is left under the name of `out`.

    Example:
        >>> grown = secateur.upcycle(["seed", "code", "law"], "grown", form="btx")
        >>> grown.experts, grown.model_type
        (3, 'mixtral')
    """
    check_given(upcycle, locals())
    paths, target_folder = [Path(one) for one in as_texts(parents)], Path(out)
    asked = Asked(
        form=form,
        target=target,
        experts=experts,
        top_k=top_k,
        granularity=granularity,
        attention_from=attention_from,
        kv=kv,
        attention_top_k=attention_top_k,
        renormalise=renormalise,
        noise=noise,
        division=division,
        shared_neurons=shared_neurons,
        router=router,
        router_std=router_std,
        router_data=tuple(as_texts(router_data)),
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        allow_unrelated=allow_unrelated,
    )
    asked.check()
    check_form(asked, len(paths))
    for path in paths:
        check_apart(path, target_folder)
    found = read_parents(paths, allow_unrelated=allow_unrelated)
    plan = blueprint(asked, found)
    layout_of(plan).check(found, plan)
    layout_of(plan).config(found, plan)  # what it refuses is refused before anything is written
    _check_router_data(asked, plan, len(paths))
    sample = None if text is None else Path(text)
    if is_occupied(target_folder):
        return _already(found, asked, plan, paths, target_folder)
    if dry_run:
        return _upcycled(target_folder, _foreseen(found, plan, asked))
    return _upcycled(target_folder, _write(found, plan, asked, target_folder, sample, restart, on_progress))


def _check_router_data(asked: Asked, plan: Blueprint, num_parents: int) -> None:
    reads_text = STARTS[plan.start].targets is not None or asked.division == "coactivation" or asked.shared_neurons
    if asked.router_data and not reads_text:
        raise SecateurError(f"--router-data: --router {plan.start} reads no text; leave it out")
    if reads_text and num_parents > 1 and len(asked.router_data) != num_parents:
        raise SecateurError(
            f"--router-data: found {len(asked.router_data)}, expected one for each of the {num_parents} parents, in "
            "their order"
        )


def _foreseen(parents: Parents, plan: Blueprint, asked: Asked) -> dict[str, Any]:
    """The report of a dry run: shapes need neither routers nor a division."""
    from secateur.files.safetensors_header import BITS
    from secateur.model_folder.read.tensor_files import StoredTensor

    routers = {}
    for layer in range(parents.layers):
        for name, sees in layout_of(plan).routers(plan, layer).items():
            shape = (1 if sees == "gate" else len(plan.experts), parents.hidden)
            length = math.prod(shape) * BITS[parents.dtype] // 8
            routers[name] = StoredTensor(file="", dtype=parents.dtype, shape=shape, start=0, length=length)
    made = layout_of(plan).tensors(parents, plan, asked, {}, routers)
    return describe(parents, plan, sum(one.length for one in made), len(made))


def _already(parents: Parents, asked: Asked, plan: Blueprint, paths: Sequence[Path], out: Path) -> Upcycled:
    """The result that is there, if it is what would be written; else an error."""
    from secateur.upcycling.checks import check_upcycled
    from secateur.upcycling.record import read_record

    if out.is_symlink() or not (out / RECORD).is_file() or not (out / REPORT).is_file():
        raise occupied(out)
    before = read_record(out)[0].options
    options = as_noted(dataclasses.asdict(asked))
    if before != options:
        raise occupied(out, f"{differing(before, options)[0]} was another")
    failed = [check for check in check_upcycled(paths, out) if check.passed is False]
    if failed:
        raise occupied(out, f"{failed[0].claim} ({failed[0].detail})")
    work = place_of_work(out, WORK)
    if work.is_dir():
        with work_folder(work, dict, f"--out {out}: another process is growing into it") as left:
            left.remove()
    return _upcycled(out, read_object(out / REPORT) | {IS_THERE: True})


def _write(
    parents: Parents,
    plan: Blueprint,
    asked: Asked,
    out: Path,
    text: Path | None,
    restart: bool,
    on_progress: OnStage | None,
) -> dict[str, Any]:
    from secateur.upcycling import write
    from secateur.upcycling.compare import compare, text_tokens

    tokens = None if text is None else text_tokens(text, parents.first.path, parents["vocab_size"])
    started = write.Started(
        parents=tuple(as_noted(parent.files.state) for parent in parents.each),
        options=as_noted(dataclasses.asdict(asked)),
    )
    place = place_of_work(out, WORK)
    refusal = f"--out {out}: another process is growing into it (it holds {place})"
    with work_folder(place, write.Started, refusal, restart=restart) as work:
        _check_same(work, started)
        kept = Kept(work, work.before.kept if work.before else {})
        kept.note(as_noted(msgspec.structs.asdict(started)))
        division, routers = write.prepared(parents, plan, asked, work, kept, on_progress)
        tensors = layout_of(plan).tensors(parents, plan, asked, division, routers)
        shards, told = write.write_shards(parents, tensors, work, kept, stage("writing", on_progress))
        report = describe(parents, plan, sum(one.length for one in tensors), len(tensors))
        record = write.record_of(
            parents, told, plan, started.options, tensors, write.router_digests(work.path, routers), division
        )
        with written_beside(out) as beside:
            write.fill(beside, parents, plan, asked, tensors, shards, work, record)
            _check_loads(beside)
            if tokens is not None:
                files = [parent.files for parent in parents.each]
                report["comparison"] = compare(beside, files, tokens, stage("comparing models", on_progress))
            atomic_write(beside / CARD, card(report, f"secateur upcycle --form {asked.form}"))
            atomic_write(beside / REPORT, json.dumps(report, indent=2) + "\n")
            for parent in parents.each:
                parent.files.check_unchanged()
        work.remove()
    return report


def _check_loads(folder: Path) -> None:
    """Every tensor has the name, shape and place that the stock architecture expects."""
    from secateur.model_folder.read.load import problems_by_names
    from secateur.model_folder.read.model_folder import read_model_folder

    if problems := problems_by_names(read_model_folder(folder)):
        raise SecateurError(f"what was written does not load: {problems}"[:500])


def _check_same(work: Work[Any], now: Any) -> None:
    if work.before is None:
        return
    names = differing(work.before.options, now.options)
    if work.before.parents != now.parents:
        names = ["parents", *names]
    if names:
        raise SecateurError(
            f"{work.path}: an unfinished start with another {names[0]}; give what was given then, or begin anew with "
            "--restart"
        )


def _upcycled(out: Path, report: dict[str, Any]) -> Upcycled:
    return Upcycled(
        out=out,
        model_type=report["model_type"],
        experts=report["experts"],
        top_k=report["top_k"],
        num_bytes=report["bytes_after"],
        comparison=report["comparison"],
        content=report,
    )
