"""What is grown: the table of forms. Each says how many parents it takes, which experts it makes, and at what scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from secateur.errors import SecateurError
from secateur.files.safetensors_header import BITS
from secateur.upcycling.options import Asked
from secateur.upcycling.parents import Parents
from secateur.upcycling.targets import BAM, Target, target_for


@dataclass(frozen=True, kw_only=True)
class ExpertSource:
    """An expert: piece `piece` of `pieces` equal ones of a parent's FFN. unit: experts of one unit share router rows.

    Where the neurons are divided by a list, a piece is that much of the list; else that much of the FFN, in its order.
    """

    parent: int
    piece: int
    pieces: int
    unit: int


@dataclass(frozen=True, kw_only=True)
class Blueprint:
    """The mixture to write.

    factor: of the down projections of experts. shared: neurons of each layer's shared expert, whose down projection is
    times 2, as its gate is 0 and sigmoid(0) is 1/2. renormalises: whether the chosen weights are divided by their sum.
    exact: what the start computes, in words. shares_kv, attention_top_k, router_std: of a BAM, see `BamConfig`.
    """

    form: str
    target: Target
    experts: tuple[ExpertSource, ...]
    top_k: int
    renormalises: bool
    factor: float
    width: int
    shared: int
    start: str
    exact: str
    shares_kv: bool = False
    attention_top_k: int | None = None
    router_std: float = 0.02

    @property
    def units(self) -> int:
        return self.experts[-1].unit + 1


@dataclass(frozen=True, kw_only=True)
class Form:
    """A row of the table.

    parents: how many it takes, least and most. takes: options that belong to it; another one is refused. start: of the
    router, where nothing else is asked for; starts: that fit. splits: whether one FFN becomes all experts.
    target: where it is no stock one. top_k: without another wish, of whole FFNs. renormalises: likewise.
    experts: what they are made of. factor: (all experts, top-k, granularity, renormalises) -> of the down projection.
    """

    help: str
    parents: tuple[int, int | None]
    takes: frozenset[str]
    start: str
    starts: tuple[str, ...]
    splits: bool
    experts: Callable[[Asked, int], tuple[ExpertSource, ...]]
    factor: Callable[[int, int, int, bool], float]
    exact: Callable[[bool], str]
    target: Target | None = None
    top_k: int = 2
    renormalises: bool = True


def _of_parents(asked: Asked, parents: int) -> tuple[ExpertSource, ...]:
    count = asked.granularity
    return tuple(
        ExpertSource(parent=parent, piece=piece, pieces=count, unit=parent)
        for parent in range(parents)
        for piece in range(count)
    )


def _copies(asked: Asked, parents: int) -> tuple[ExpertSource, ...]:
    count = asked.granularity
    return tuple(
        ExpertSource(parent=0, piece=piece, pieces=count, unit=copy)
        for copy in range(asked.experts or 0)
        for piece in range(count)
    )


def _divided(asked: Asked, parents: int) -> tuple[ExpertSource, ...]:
    count = asked.experts or 0
    return tuple(ExpertSource(parent=0, piece=piece, pieces=count, unit=piece) for piece in range(count))


def _whole_factor(experts: int, top_k: int, granularity: int, renormalises: bool) -> float:
    """Each of the G pieces of an FFN is chosen top_k / G times, at 1 / top_k or, not renormalised, 1 / experts."""
    return float(granularity) if renormalises else experts * granularity / top_k


def _split_factor(experts: int, top_k: int, granularity: int, renormalises: bool) -> float:
    """A chosen expert has weight 1 at a zero router: its probability is 1 / experts or, renormalised, 1 / top_k."""
    return float(top_k if renormalises else experts)


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "btx": Form(
            help="every parent's FFN is an expert, the rest is averaged (2403.07816)",
            parents=(2, None),
            takes=frozenset({"granularity", "attention_from", "top_k"}),
            start="random",
            starts=("random", "hidden", "ridge"),
            splits=False,
            experts=_of_parents,
            factor=_whole_factor,
            exact=lambda renormalises: (
                "a token whose chosen experts are all of one parent gets that parent's FFN; cutting changes nothing"
            ),
        ),
        "bam": Form(
            help="every parent's attention and FFN are experts, the rest is averaged (2408.08274)",
            parents=(2, None),
            takes=frozenset({"kv", "attention_top_k", "renormalise", "top_k"}),
            start="random",
            starts=("random", "hidden", "ridge"),
            splits=False,
            experts=_of_parents,
            factor=lambda experts, top_k, granularity, renormalises: 1.0,
            exact=lambda renormalises: (
                "the mixture of the parents' attentions, and the chosen FFN at weight 1"
                if renormalises
                else "the mixture of the parents' attentions, and the chosen FFN times its probability, about 1 / "
                "experts while the router is small: no parent's function, also where all parents are equal"
            ),
            target=BAM,
            top_k=1,
            renormalises=False,
        ),
        "copy": Form(
            help="copies of one parent's FFN (2212.05055; with --granularity 2410.07524)",
            parents=(1, 1),
            takes=frozenset({"granularity", "experts", "noise", "renormalise", "top_k"}),
            start="random",
            starts=("random",),
            splits=False,
            experts=_copies,
            factor=_whole_factor,
            exact=lambda renormalises: (
                "the parent's function, without noise"
                if renormalises
                else "the parent's function where the router is 0"
            ),
        ),
        "split": Form(
            help="one parent's FFN, its neurons divided into experts",
            parents=(1, 1),
            takes=frozenset({"experts", "top_k", "division", "renormalise", "shared_neurons"}),
            start="norm",
            starts=("norm", "random"),
            splits=True,
            renormalises=False,
            experts=_divided,
            factor=_split_factor,
            exact=lambda renormalises: (
                "the parent's function where all experts are chosen and the router is 0; a chosen expert has weight 1"
                + (
                    " at this top-k only, since this architecture divides by the sum of the chosen"
                    if renormalises
                    else ""
                )
            ),
        ),
    }
)


def blueprint(asked: Asked, parents: Parents) -> Blueprint:
    """The mixture that is asked for.

    Raises:
        SecateurError: the options do not fit the form, the parents or each other.
    """
    form = FORMS[asked.form]
    if form.target is not None and asked.target is not None:
        raise SecateurError(f"--target {asked.target}: --form {asked.form} becomes a {form.target.model_type}")
    target = form.target or target_for(parents.model_type, asked.target, split=form.splits)
    if "experts" in form.takes and asked.experts is None:
        raise SecateurError(f"--experts: --form {asked.form} needs a number")
    experts = form.experts(asked, len(parents.each))
    shared = asked.shared_neurons
    if shared and not target.shared:
        raise SecateurError(f"--shared-neurons {shared}: a {target.model_type} model has no shared expert")
    pieces, width = experts[0].pieces, parents.width - shared
    if width <= 0 or width % pieces:
        what = "--experts" if form.splits else "--granularity"
        raise SecateurError(
            f"{what} {pieces}: does not divide the {width} neurons of an FFN"
            + (f" ({parents.width} without the {shared} shared ones)" if shared else "")
        )
    _check_width(width // pieces, parents.dtype)
    top_k = _top_k(asked, form, len(experts))
    renormalises = _renormalises(asked, form, target)
    if asked.attention_from is not None and not 0 <= asked.attention_from < len(parents.each):
        raise SecateurError(f"--attention-from {asked.attention_from}: expected 0 to {len(parents.each) - 1}")
    if (asked.attention_top_k or 0) > len(parents.each):
        raise SecateurError(f"--attention-top-k {asked.attention_top_k}: only {len(parents.each)} attention experts")
    start = asked.router or form.start
    if start not in form.starts:
        raise SecateurError(f"--router {start}: --form {asked.form} takes {', '.join(form.starts)}")
    return Blueprint(
        form=asked.form,
        target=target,
        experts=experts,
        top_k=top_k,
        renormalises=renormalises,
        factor=form.factor(len(experts), top_k, asked.granularity, renormalises),
        width=width // pieces,
        shared=shared,
        start=start,
        exact=form.exact(renormalises),
        shares_kv=asked.kv == "shared",
        attention_top_k=asked.attention_top_k,
        router_std=asked.router_std,
    )


def _check_width(width: int, dtype: str) -> None:
    """torch multiplies by all experts in one call (grouped_mm), and takes no row that is not a multiple of 16 bytes."""
    multiple = 16 * 8 // BITS[dtype]
    if width % multiple:
        raise SecateurError(
            f"experts of {width} neurons: transformers computes only experts whose width is a multiple of {multiple} "
            f"in {dtype}; choose another --experts, --granularity or --shared-neurons"
        )


def _renormalises(asked: Asked, form: Form, target: Target) -> bool:
    if target.renormalises is None and asked.renormalise is False:
        raise SecateurError(f"--no-renormalise: a {target.model_type} model always divides by the sum of the chosen")
    if target.renormalises is None:
        return True
    return form.renormalises if asked.renormalise is None else asked.renormalise


def _top_k(asked: Asked, form: Form, count: int) -> int:
    if asked.top_k is None and form.splits:
        raise SecateurError(f"--top-k: --form {asked.form} needs a number, of {count} experts")
    top_k = asked.top_k or min(form.top_k * asked.granularity, count)
    if top_k > count:
        raise SecateurError(f"--top-k {top_k}: only {count} experts a layer")
    if top_k % asked.granularity:
        raise SecateurError(
            f"--top-k {top_k}: not a multiple of --granularity {asked.granularity}; a token would get a part of an FFN"
        )
    return top_k


def check_form(asked: Asked, num_parents: int) -> None:
    """Refuse options that do not belong to the form, before anything is read.

    Raises:
        SecateurError: names the option, or says how many parents the form takes.
    """
    form = FORMS.get(asked.form)
    if form is None:
        raise SecateurError(f"--form {asked.form}: expected {', '.join(FORMS)}")
    least, most = form.parents
    if num_parents < least or (most is not None and num_parents > most):
        wanted = f"at least {least}" if most is None else f"{least}"
        hint = "; for one model there are --form copy and --form split" if num_parents == 1 and least > 1 else ""
        raise SecateurError(f"--form {asked.form}: found {num_parents} parent(s), expected {wanted}{hint}")
    every = frozenset().union(*(one.takes for one in FORMS.values()))
    for name in sorted(every - form.takes):
        if getattr(asked, name) != getattr(Asked, name, None):
            raise SecateurError(f"--{name.replace('_', '-')}: --form {asked.form} does not take it")
