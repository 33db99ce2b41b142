"""Arrays inside a plan: neuron lists and solved matrices, compared by their content and never changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from secateur.errors import SecateurError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_WIDTH = 2**31 - 1  # neurons are numbered by 32 bits


class _Array:
    """A read-only array that equals another of its class with the same type, shape and bytes."""

    __slots__ = ("array",)
    array: NDArray[Any]

    def __init__(self, array: NDArray[Any]) -> None:
        array.setflags(write=False)
        object.__setattr__(self, "array", array)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed, found an assignment to {name}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} cannot be changed, found a deletion of {name}")

    @property
    def _content(self) -> tuple[str, tuple[int, ...], bytes]:
        return self.array.dtype.str, self.array.shape, self.array.tobytes()

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._content == other._content

    def __hash__(self) -> int:
        return hash(self._content)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.array,)


def _as_array(values: Any) -> NDArray[Any]:
    import numpy as np

    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # lists of several lengths, tensors that torch keeps
        raise SecateurError(f"plan: found {values!r:.80}, expected an array of numbers ({error!s:.100})") from error


class Neurons(_Array):
    """Which old neurons of an expert the new one has, in their new order: `ids[new] = old`, (F',) int32.

    All of them in another order is a permutation; fewer are the kept channels.

    Raises:
        SecateurError: none, one twice, or an id that is no whole number of 0 or more.
    """

    __slots__ = ()

    def __init__(self, ids: Iterable[int] | NDArray[np.integer[Any]]) -> None:
        import numpy as np

        found = _as_array(ids if hasattr(ids, "__array__") else list(ids) if isinstance(ids, Iterable) else ids)
        if found.ndim != 1 or not found.size or found.dtype.kind not in "iu":
            raise SecateurError(
                f"neurons: found {found.dtype} of shape {found.shape}, expected a list of whole numbers"
            )
        if int(found.min()) < 0 or int(found.max()) > MAX_WIDTH:
            raise SecateurError(f"neurons: ids from {found.min()} to {found.max()}, expected 0 to {MAX_WIDTH}")
        ordered = np.sort(found)
        if twice := ordered[1:][ordered[1:] == ordered[:-1]].tolist():
            raise SecateurError(f"neurons: {twice!r:.200} are listed more than once, expected once")
        super().__init__(found.astype("<i4"))

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(self.array.tolist())

    def __len__(self) -> int:
        return int(self.array.size)

    def __repr__(self) -> str:
        return f"Neurons({self.ids!r:.80})"

    @property
    def largest(self) -> int:
        return int(self.array.max())

    def is_identity(self, width: int) -> bool:
        """Whether all `width` neurons stay where they are."""
        return len(self) == width and bool((self.array[1:] > self.array[:-1]).all())

    def then(self, later: Neurons) -> Neurons:
        """These neurons first, then of the result those that `later` names."""
        return Neurons(self.array[later.array])

    def inverse(self) -> Neurons:
        """Of a permutation of all neurons, the one that undoes it."""
        return Neurons(self.array.argsort())


class Matrix(_Array):
    """A matrix that was solved for, to stand in the place of a mixed one; (rows, columns) float32 or float64, finite.

    Raises:
        SecateurError: another type or number of axes, no entry, or one that is not finite.
    """

    __slots__ = ()

    def __init__(self, values: Any) -> None:
        import numpy as np

        found = _as_array(values).copy()
        if found.ndim != 2 or not found.size or found.dtype not in (np.float32, np.float64):
            raise SecateurError(
                f"a solved matrix: found {found.dtype} of shape {found.shape}, expected (rows, columns) float32 or "
                "float64"
            )
        if not np.isfinite(found).all():
            raise SecateurError("a solved matrix: an entry is not finite")
        super().__init__(np.ascontiguousarray(found.astype(found.dtype.newbyteorder("<"))))

    def __repr__(self) -> str:
        return f"Matrix({self.array.dtype} of shape {self.array.shape})"
