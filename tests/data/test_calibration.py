"""Calibration data: documents become blocks as counted by hand, domains give fair shares, chats use the template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from secateur.data import calibration
from secateur.data.calibration import Calibration, calibrate, fair_shares
from secateur.data.corpus import Document
from secateur.data.packing import pack as pack_documents
from secateur.data.tokenizer import encode, train_tokenizer
from secateur.errors import SecateurError

# Every message as <role>content; what the template adds is plain to see.
TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, and 0 at the end of a document."""
    return train_tokenizer(["abc"], vocab_size=257)


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(letter) if letter != "|" else 0 for letter in text]


def write(folder: Path, name: str, *texts: str) -> str:
    """A .jsonl file of documents."""
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(folder / name)


def write_chats(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in zip("uaua", contents, strict=False)]}


def tokens(data: Calibration) -> list[list[int]]:
    return [one.tolist() for one in data.sequences]


def drawn(tokenizer: PreTrainedTokenizerFast, *specs: str, **options: Any) -> Calibration:
    return calibrate(tokenizer, specs, **{"samples": 2, "sequence_length": 4, **options})


def test_documents_are_joined_with_the_end_token_and_cut_into_blocks(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    # abcde| fg| hijk|  ->  abcd e|fg |hij k| (the last is no whole block)
    data = drawn(tokenizer, write(tmp_path, "a.jsonl", "abcde", "fg", "hijk"), samples=3)
    assert tokens(data) == [ids(tokenizer, block) for block in ("abcd", "e|fg", "|hij")]
    assert data.num_tokens == 12
    assert data.batches(2)[1].attention_mask is None
    assert [batch.input_ids.shape for batch in data.batches(2)] == [(2, 4), (1, 4)]


def test_without_an_end_token_documents_follow_each_other(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    data = drawn(bare, write(tmp_path, "a.jsonl", "abcde", "fg", "h"))
    assert tokens(data) == [ids(tokenizer, "abcd"), ids(tokenizer, "efgh")]


def test_one_document_a_sequence_is_cut_and_padded(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = drawn(tokenizer, write(tmp_path, "a.jsonl", "abcdef", "gh"), pack=False)
    assert tokens(data) == [ids(tokenizer, "abcd"), ids(tokenizer, "gh")]
    (batch,) = data.batches(8)
    assert batch.input_ids.tolist() == [ids(tokenizer, "abcd"), ids(tokenizer, "gh||")]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_domains_give_the_same_number_of_blocks_and_say_so(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    much, little = write(tmp_path, "much.jsonl", "a" * 400), write(tmp_path, "little.jsonl", "b" * 11)
    data = drawn(tokenizer, much, f"own={little}", samples=9)
    assert data.domains == {"much": 6, "own": 3}
    assert data.to_json()["domains"] == {"much": {"sequences": 6, "tokens": 24}, "own": {"sequences": 3, "tokens": 12}}
    assert tokens(data)[6:] == [ids(tokenizer, "bbbb"), ids(tokenizer, "bbbb"), ids(tokenizer, "bbb|")]


@pytest.mark.parametrize(
    ("available", "wanted", "shares"),
    [
        ([10, 10], 4, [2, 2]),
        ([10, 10], 5, [3, 2]),
        ([10, 1, 10], 9, [4, 1, 4]),
        ([0, 3], 2, [0, 2]),
        ([2, 2], 9, [2, 2]),
        ([5, 5, 5], 2, [1, 1, 0]),
    ],
)
def test_shares_are_fair(available: Sequence[int], wanted: int, shares: Sequence[int]) -> None:
    assert list(fair_shares(dict(zip("abc", available, strict=False)), wanted).values()) == shares


def test_the_seed_draws_the_blocks_and_the_digest_tells_them_apart(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = write(tmp_path, "a.jsonl", "".join(chr(33 + number % 90) for number in range(4000)))
    one, again, other = (drawn(tokenizer, text, samples=20, seed=seed) for seed in (0, 0, 1))
    assert tokens(one) == tokens(again)
    assert one.digest == again.digest
    assert tokens(one) != tokens(other)
    assert one.digest != other.digest
    starts = [block[0] for block in tokens(one)]
    assert len(set(starts)) > 10, "blocks from one place only"


def test_a_large_domain_is_sampled_from_all_of_it_in_its_order(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "ROOM", 1)
    letters = "abcdefghijklmnopqrstuvwxyz"
    text = write(tmp_path, "a.jsonl", *(letter * 4 for letter in letters))  # with its end, a block each
    places = {block: place for place, letter in enumerate(letters) for block in ids(tokenizer, letter)}
    for options in ({}, {"pack": False}):
        kept = [places[block[0]] for block in tokens(drawn(tokenizer, text, samples=9, sequence_length=5, **options))]
        assert len(set(kept)) == 9
        assert kept == sorted(kept)
        assert max(kept) > 13, "the beginning only"
        assert kept != sorted(
            places[block[0]]
            for block in tokens(drawn(tokenizer, text, samples=9, sequence_length=5, seed=1, **options))
        )


def test_no_more_is_tokenised_than_is_needed(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    monkeypatch.setattr(
        calibration,
        "encode",
        lambda tokenizer, texts, **options: encoded.append(sum(map(len, texts))) or encode(tokenizer, texts, **options),
    )
    monkeypatch.setattr(calibration, "ROOM", 2)
    drawn(tokenizer, write(tmp_path, "a.jsonl", *["abcdefgh"] * 100), samples=3, sequence_length=8)
    drawn(tokenizer, write(tmp_path, "b.jsonl", "a" * 1000), samples=3, sequence_length=8)
    assert encoded == [48, 48]


def test_what_spells_a_special_token_in_a_text_is_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    data = drawn(tokenizer, write(tmp_path, "a.jsonl", "<|endoftext|>xy"), samples=1, sequence_length=15)
    assert 0 not in tokens(data)[0]


def test_chats_go_through_the_template_and_get_no_further_end(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    rows = write_chats(tmp_path / "chats.jsonl", chat("ab", "c"), chat("d"))
    data = drawn(tokenizer, rows, samples=3)
    assert tokens(data) == [ids(tokenizer, block) for block in ("<u>a", "b<a>", "c<u>")]
    assert data.domains == {"chats": 3}
    mixed = drawn(tokenizer, f"talk={tmp_path}/*.jsonl", write(tmp_path, "plain.txt", "z" * 9), samples=2)
    assert mixed.domains == {"talk": 1, "plain": 1}


def test_chats_need_a_template(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    rows = write_chats(tmp_path / "chats.jsonl", chat("ab"))
    with pytest.raises(SecateurError, match=r"chats.jsonl:1: found chat messages, .* has no chat template"):
        drawn(tokenizer, rows)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"text": "plain"}, r"chats.jsonl:2: found None, expected a list of messages"),
        ({"messages": []}, "expected a list of messages"),
        ({"messages": [{"content": "x"}]}, "each with role and content"),
        (["x"], "expected a list of messages"),
        ({"messages": [{"role": "u", "content": "refuse"}]}, "the chat template of .* refuses the messages"),
    ],
)
def test_a_chat_file_of_something_else_is_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, second: Any, message: str
) -> None:
    refusing = "{% if messages[0]['content'] == 'refuse' %}{{ raise_exception('no') }}{% endif %}" + TEMPLATE
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    with pytest.raises(SecateurError, match=message):
        drawn(tokenizer, write_chats(tmp_path / "chats.jsonl", chat("ab"), second))


def test_too_little_text_says_what_there_is(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(SecateurError, match=r"found 0 blocks of 4 tokens \(a 0\), expected 2"):
        drawn(tokenizer, write(tmp_path, "a.jsonl", "ab"))
    with pytest.raises(SecateurError, match=r"found 1 documents \(a 1\), expected 2"):
        drawn(tokenizer, write(tmp_path, "a.jsonl", "abcdefghijkl"), pack=False)


@pytest.mark.parametrize(("option", "value"), [("samples", 0), ("sequence_length", 1)])
def test_sizes_below_the_least_are_refused(tokenizer: PreTrainedTokenizerFast, option: str, value: int) -> None:
    with pytest.raises(SecateurError, match=f"{option}: found {value}, expected at least {value + 1}"):
        drawn(tokenizer, **{option: value})


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("special", [False, True], ids=["", "adds its own"])
def test_a_tokenizer_that_makes_no_token_is_named_with_the_reason(pack: bool, special: bool, tmp_path: Path) -> None:
    backend = Tokenizer(models.BPE({"<end>": 0, "Z": 1}, []))
    if special:
        backend.post_processor = processors.TemplateProcessing("<end> $A", None, [("<end>", 0)])
    empty = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    empty.name_or_path = "made/up"
    text = write(tmp_path, "one.jsonl", "some text that it does not know")
    with pytest.raises(SecateurError, match=r"tokenizer made/up: it makes no token of 1 texts \(one begins with 'some"):
        drawn(empty, text, samples=1, sequence_length=2, pack=pack)
    with pytest.raises(SecateurError, match="it has 2 tokens and no token for what it does not know"):
        pack_documents(empty, [Document(text="some text", domain="one", source="here")], sequence_length=2)
    empty.chat_template = "{% for one in messages %}{{ one['content'] }}{% endfor %}"
    chats = write_chats(tmp_path / "chats.jsonl", chat("some"))
    with pytest.raises(SecateurError, match=r"chats.jsonl:1: the tokenizer made/up makes no token of the messages"):
        drawn(empty, chats, samples=1, sequence_length=2, pack=pack)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<end>": 0})), eos_token="<end>")
    with pytest.raises(SecateurError, match=r"cannot encode the text .*Missing"):
        drawn(words, text, samples=1, sequence_length=2, pack=pack)
