"""The data of a run: prepared once, read again at a resume, and compared with what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from secateur.data.prepare import PreparedData, load_prepared, prepare, save_prepared
from secateur.errors import SecateurError
from secateur.files.progress import OnStage
from secateur.files.seen import Seen
from secateur.pretraining.preflight import check_data
from secateur.pretraining.run_folder import RunFolder
from secateur.pretraining.settings import RunSettings
from secateur.train.distributed import launch

MADE_AGAIN = "take {} away and go on with --resume, which makes it again from the same text"


def seen_in(data: Path) -> Seen:
    """On the rank that writes; others may not see the folder."""
    return Seen.of(path for path in sorted(data.rglob("*")) if path.is_file()) if launch.is_main() else Seen()


def data_of(
    settings: RunSettings,
    folder: RunFolder,
    tokenizer: Callable[[], PreTrainedTokenizerBase | None],
    on_progress: OnStage | None,
) -> PreparedData:
    """The tokens of the run; rank 0 prepares them for all, by the tokenizer that was given or one that it trains.

    Raises:
        SecateurError: they are damaged, or missing and cannot be made again.
    """
    if launch.is_main() and not folder.data.is_dir():

        def progress(what: str, done: int, total: int | None) -> None:
            if on_progress is not None:
                on_progress(what, done, total or 0)

        began = _digest(folder)
        data = prepare(
            settings.data.data,
            tokenizer=tokenizer(),
            vocab_size=settings.model.vocab_size,
            sequence_length=settings.data.sequence_length,
            validation_share=settings.data.validation_share,
            seed=settings.data.seed,
            max_bytes=settings.data.max_data_bytes,
            text_key=settings.data.text_key,
            progress=progress,
        )
        check_data(settings.model, settings.training, data)
        if began not in (None, data.report["digest"]):
            raise SecateurError(
                f"{folder.data}: it is missing, and the text that it was made from is not the same any more; put the "
                "folder back, or the text, or start a new run"
            )
        save_prepared(data, folder.data)
        launch.barrier()
        return data
    launch.barrier()
    try:
        return load_prepared(folder.data)
    except SecateurError as error:
        raise SecateurError(f"{error}; {MADE_AGAIN.format(folder.data)}") from error


def _digest(folder: RunFolder) -> str | None:
    """Of the text that the run in a folder began with; None of a new one."""
    told = folder.read_run().get("data") if folder.run.is_file() else None
    return told.get("digest") if isinstance(told, dict) else None
