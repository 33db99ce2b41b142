"""Text for a language model: documents and chats become blocks of tokens of one length, and every token counts."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import ConcatDataset
from transformers import PreTrainedTokenizerBase

from secateur.data.calibration import read_texts, token_lists
from secateur.data.chats import Chat
from secateur.data.corpus import Document
from secateur.data.packing import BlockDataset, PackedTokens
from secateur.data.tokenizer import check_ids, load_tokenizer
from secateur.errors import SecateurError
from secateur.finetuning.settings import DataSettings, ModelSettings
from secateur.finetuning.task import Task
from secateur.model_folder.read.model_folder import ModelFolder

LENGTH = 512


def text_task(folder: ModelFolder, data: DataSettings, model: ModelSettings) -> Task:
    """The blocks that `data` names, by the model's own tokenizer.

    Raises:
        SecateurError: no such text, too little of it, no tokenizer, or one that does not fit the model; or a loss that
            the model cannot have.
    """
    if model.router_aux_loss and folder.config.kept:
        raise SecateurError(
            f"--router-aux-loss: {folder.files.path} has zero slots in layers {sorted(folder.config.kept)}, and a loss "
            "that balances experts would count the empty ones; leave it out, or give 0 for none"
        )
    config = folder.config.text
    longest = getattr(config, "max_position_embeddings", None)
    length = data.sequence_length or min(LENGTH, longest or LENGTH)
    if longest is not None and length > longest:
        raise SecateurError(
            f"--sequence-length {length}: by config.json the model takes sequences of up to {longest} tokens"
        )
    tokenizer = load_tokenizer(folder.files.path)
    train = pack_domains(tokenizer, data.data, length, data)
    evaluation = pack_domains(tokenizer, data.eval_data, length, data) if data.eval_data else {}
    for dataset in (*train.values(), *evaluation.values()):
        check_ids(int(dataset.blocks.max()), int(config.vocab_size), folder.files.path)
    return Task(
        unit="tokens",
        per_item=length,
        train=ConcatDataset([BlockDataset(dataset) for dataset in train.values()]),
        evaluation={domain: BlockDataset(dataset) for domain, dataset in evaluation.items()},
        about={"sequence_length": length, "train": _about(train), "eval": _about(evaluation)},
    )


def pack_domains(
    tokenizer: PreTrainedTokenizerBase, specs: Sequence[str], length: int, settings: DataSettings
) -> dict[str, PackedTokens]:
    """Domain -> blocks of `length` tokens: its texts joined, the end-of-text token after each where there is one.

    Chats end as their template ends them. What is left after the last whole block is not used.

    Raises:
        SecateurError: a domain that has not one block.
    """
    texts: dict[str, list[Document | Chat]] = {}
    for text in read_texts(specs, settings.text_key, settings.split):
        texts.setdefault(text.domain, []).append(text)
    return {domain: _pack(tokenizer, domain, mine, length) for domain, mine in sorted(texts.items())}


def _pack(
    tokenizer: PreTrainedTokenizerBase, domain: str, texts: Sequence[Document | Chat], length: int
) -> PackedTokens:
    stream = array("i")
    for ids in token_lists(tokenizer, texts, None, special=False):
        stream.extend(ids)
    count = len(stream) // length
    if not count:
        raise SecateurError(
            f"data {domain!r}: {len(stream)} tokens, expected at least one sequence of {length}; a smaller "
            "--sequence-length needs less text"
        )
    return PackedTokens(
        blocks=torch.frombuffer(stream, dtype=torch.int32, count=count * length).view(count, length),
        num_documents=len(texts),
        num_tokens=count * length,
        num_dropped=len(stream) - count * length,
        tokens_by_domain={domain: len(stream)},
    )


def _about(domains: Mapping[str, PackedTokens]) -> dict[str, Any]:
    return {
        domain: {
            "documents": domain_name.num_documents,
            "sequences": len(domain_name.blocks),
            "tokens": domain_name.num_tokens,
            "tokens_left_over": domain_name.num_dropped,
            "digest": domain_name.digest(),
        }
        for domain, domain_name in domains.items()
    }
