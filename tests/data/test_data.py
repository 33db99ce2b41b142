"""Data: what is read, how it is split, tokenised, packed, and kept with a run."""

from __future__ import annotations

import hashlib
import json
import random
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from secateur.data import packing, prepare, split
from secateur.data.corpus import Document, embedded_specs, read_documents
from secateur.data.packing import BlockDataset, PackedTokens, pack
from secateur.data.prepare import load_prepared, save_prepared
from secateur.data.split import Corpus, build_corpus
from secateur.data.tokenizer import check_vocabulary_fits, load_tokenizer, train_tokenizer
from secateur.errors import SecateurError
from support.fresh import in_fresh

WORDS = ("the", "pruned", "expert", "of", "a", "layer", "that", "no", "token", "reached", "goes", "rows", "stay")


def sentence(seed: int, num_words: int = 40) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=num_words))


def documents(count: int, domain: str = "d", first: int = 0) -> list[Document]:
    return [
        Document(text=f"{domain} {i} {sentence(i)}", source=f"{domain}/{i}", domain=domain)
        for i in range(first, first + count)
    ]


def texts(found: tuple[Document, ...] | list[Document]) -> list[str]:
    return [document.text for document in found]


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerBase:
    """257 tokens: id 0 ends a document, then the 256 bytes in the order of their printable stand-ins ('!' is 1)."""
    return train_tokenizer(["a"], vocab_size=257)


@pytest.fixture
def two_domains(tmp_path: Path) -> Path:
    for domain in ("novels", "manuals"):
        (tmp_path / domain).mkdir()
        for i in range(12):
            (tmp_path / domain / f"{i}.txt").write_text(f"{domain} {i} {sentence(i, 120)}\n")
    return tmp_path


# --- reading ---


def test_each_kind_of_file_gives_its_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfmark\r\n")
    (tmp_path / "a.md").write_text("# \u00e9t\u00e9")
    (tmp_path / "c.PY").write_text("x = 1")
    (tmp_path / "d.jsonl").write_text('{"text": "one"}\n\n{"text": "", "n": 1}\n{"text": "two", "messages": []}')
    parquet.write_table(pyarrow.table({"text": ["row 0", "row 1"], "n": [1, 2]}), tmp_path / "e.parquet")
    (tmp_path / "f.png").write_bytes(b"\xff")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "empty.txt").write_text("")
    found = list(read_documents([str(tmp_path)]))
    assert [(Path(document.source).name, document.text) for document in found] == [
        ("a.md", "# \u00e9t\u00e9"),
        ("b.txt", "mark\r\n"),
        ("c.PY", "x = 1"),
        ("d.jsonl:1", "one"),
        ("d.jsonl:4", "two"),
        ("e.parquet:0", "row 0"),
        ("e.parquet:1", "row 1"),
    ]
    assert {document.domain for document in found} == {tmp_path.name}


def test_domain_is_the_prefix_or_else_the_stem(two_domains: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(two_domains)
    (two_domains / "lang=en").mkdir()
    (two_domains / "lang=en" / "x.txt").write_text("x")
    specs = ["novels", "novels/*.txt", "novels/3.txt", "books=novels/3.txt", "lang=en", "en=lang=en/x.txt", "**/3.txt"]
    domains = [next(read_documents([spec])).domain for spec in specs]
    assert domains == ["novels", "novels", "3", "books", "lang=en", "en", two_domains.name]


def test_links_neither_loop_nor_repeat_a_folder(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "in" / "deep" / "a.txt").write_text("a")
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    (tmp_path / "in" / "deep" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "out2").symlink_to(tmp_path / "elsewhere")
    assert texts(list(read_documents([str(tmp_path / "in")]))) == ["a", "b"]


def test_dataset_name_and_configuration_reach_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Rows(list[dict[str, str]]):
        column_names = ("body", "id")

        def select_columns(self, names: list[str]) -> Rows:
            return Rows({name: row[name] for name in names} for row in self)

    def load_dataset(name: str, config: str | None, *, split: str) -> Rows:
        calls.append((name, config, split))
        return Rows([{"body": "one", "id": "1"}, {"body": "two", "id": "2"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    specs = ["hf:words", "hf:owner/words", "w=hf:owner/words/small"]
    found = list(read_documents(specs, text_key="body", split="test"))
    assert calls == [("words", None, "test"), ("owner/words", None, "test"), ("owner/words", "small", "test")]
    assert texts(found) == ["one", "two"] * 3
    assert [document.domain for document in found[::2]] == ["words", "words", "w"]
    with pytest.raises(SecateurError, match=r"found the keys \['body', 'id'\], expected the text under 'text'"):
        list(read_documents(["hf:words"]))


def test_an_existing_folder_wins_over_a_dataset_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "hf:words").mkdir()
    (tmp_path / "hf:words" / "a.txt").write_text("a")
    assert texts(list(read_documents(["hf:words"]))) == ["a"]


@pytest.mark.parametrize(
    ("spec", "module", "package"), [("hf:x", "datasets", "datasets"), ("p", "pyarrow.parquet", "pyarrow")]
)
def test_missing_extra_names_the_install_command_before_reading(
    spec: str, module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.parquet").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SecateurError, match=rf'{package} is not installed.*pip install "secateur\[datasets\]"'):
        read_documents([spec])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", r"data 'nowhere': no such file or folder; expected .*hf:NAME"),
        ("", r"data spec: found '', expected a file"),
        ("nothing/*.txt", r"found 0 files, expected at least one that ends in .txt .md"),
        ("pictures", r"data 'pictures': found 1 files, expected at least one that ends in .txt"),
        ("pictures/a.png", r"a\.png: found the extension '\.png', expected one of \.txt"),
        ("empty.txt", r"empty\.txt: found 0 bytes, expected text"),
        ("hf:a/b/c/d", r"expected hf:NAME, hf:OWNER/NAME or hf:OWNER/NAME/CONFIG"),
    ],
)
def test_spec_that_names_nothing_readable_is_refused_at_once(
    spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    (tmp_path / "empty.txt").write_bytes(b"")
    with pytest.raises(SecateurError, match=message):
        read_documents([spec])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b" \n\t", r"a\.txt': found no text, expected at least one document that is not blank"),
        ("a.txt", b"caf\xe9 au lait", r"a\.txt: not UTF-8 \(byte 0xe9 at offset 3\), expected UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}', r"a\.jsonl:2: not UTF-8 \(byte 0xff"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2: not JSON in UTF-8"),
        ("a.jsonl", b"[1]", r"a\.jsonl:1: found a JSON list, expected an object"),
        ("a.jsonl", b'{"body": "x"}', r"a\.jsonl:1: found the keys \['body'\], expected the text under 'text'"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: found int under 'text', expected a string"),
        ("a.jsonl", b'{"messages": []}', r"a\.jsonl:1: found chat 'messages', .* one string under the key 'text'"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a readable parquet file"),
    ],
)
def test_bad_file_is_named_with_what_was_found(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SecateurError, match=message):
        list(read_documents([str(tmp_path / name)]))


def test_bad_parquet_columns_are_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["x", None], "n": [1, 2]}), path)
    with pytest.raises(SecateurError, match=r"a\.parquet:1: found NoneType under 'text', expected a string"):
        list(read_documents([str(path)]))
    with pytest.raises(SecateurError, match=r"found the keys \['n', 'text'\], expected the text under 'body'"):
        list(read_documents([str(path)], text_key="body"))


def test_embedded_default_is_the_standard_library_of_this_interpreter() -> None:
    skipped: list[str] = []
    found = {document.source: document for document in read_documents([], skipped=skipped)}
    decoder = found["stdlib/json/decoder.py"]
    assert decoder.text.encode() == Path(json.decoder.__file__).read_bytes()
    assert decoder.domain == "code"
    assert {document.domain for document in found.values()} == {"code", "prose"}
    assert found["pydoc_data.topics/assert"].text.startswith("The")
    assert not any("site-packages" in source or "pydoc_data/" in source for source in found)
    assert len(skipped) < 20
    assert embedded_specs() == ("code=embedded:stdlib", "prose=embedded:topics")


def test_embedded_files_are_decoded_by_their_cookie_or_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lib = tmp_path / "lib"
    for folder in ("package", "site-packages", "pydoc_data", "test"):
        (lib / folder).mkdir(parents=True)
        (lib / folder / "a.py").write_text(f"# {folder}")
    (lib / "latin.py").write_bytes(b"# coding: latin-1\n# caf\xe9")
    (lib / "broken.py").write_bytes(b"# caf\xe9")
    (lib / "unknown.py").write_bytes(b"# coding: no-such-codec\n")
    (lib / "surrogate.py").write_bytes(b"# coding: unicode_escape\n# \\ud800")
    (tmp_path / "outside.py").write_text("# outside")
    (lib / "link.py").symlink_to(tmp_path / "outside.py")
    (lib / "package" / "loop").symlink_to(lib)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(lib))
    skipped: list[str] = []
    found = {document.source: document.text for document in read_documents(["embedded:stdlib"], skipped=skipped)}
    assert found == {
        "stdlib/latin.py": "# coding: latin-1\n# caf\u00e9",
        "stdlib/package/a.py": "# package",
        "stdlib/test/a.py": "# test",
    }
    assert skipped == ["stdlib/broken.py", "stdlib/surrogate.py", "stdlib/unknown.py"]


# --- de-duplication and split ---


def test_exact_duplicates_are_removed_and_the_first_stays() -> None:
    once = documents(30)
    again = [Document(text=document.text, source="copy", domain="other") for document in once[:10]]
    corpus = build_corpus([*once, *again])
    assert (corpus.num_documents, corpus.num_duplicates) == (30, 10)
    kept = corpus.train + corpus.validation
    assert sorted(document.source for document in kept) == sorted(document.source for document in once)
    assert corpus.digest == build_corpus(once).digest


def test_every_document_is_in_exactly_one_part_of_about_the_right_size() -> None:
    given = documents(2000)
    corpus = build_corpus(given, validation_share=0.1)
    assert sorted(texts(corpus.train + corpus.validation)) == sorted(texts(given))
    assert 140 < len(corpus.validation) < 260  # 200 expected, standard deviation 13


def test_split_and_order_do_not_depend_on_other_documents_or_reading_order() -> None:
    given = documents(400)
    before = build_corpus(given, validation_share=0.1)
    more = build_corpus(documents(100, first=400) + given[::-1], validation_share=0.1)
    old = set(texts(given))
    assert [text for text in texts(more.train) if text in old] == texts(before.train)
    assert [text for text in texts(more.validation) if text in old] == texts(before.validation)


def test_seed_changes_split_and_order_and_the_same_seed_repeats_them() -> None:
    given = documents(200)
    first, second, other = (build_corpus(given, validation_share=0.1, seed=seed) for seed in (3, 3, 4))
    assert first == second
    assert first.digest != other.digest
    assert set(texts(first.validation)) != set(texts(other.validation))


def test_training_order_mixes_domains() -> None:
    corpus = build_corpus(documents(100, "a") + documents(100, "b"))
    first_half = [document.domain for document in corpus.train[:98]]
    assert 30 < first_half.count("a") < 68


@pytest.mark.parametrize("share", [1e-9, 0.02, 0.5, 1 - 1e-9])
@pytest.mark.parametrize("seed", range(5))
def test_each_domain_has_documents_in_both_parts(share: float, seed: int) -> None:
    corpus = build_corpus(documents(2, "a") + documents(3, "b") + documents(40, "c"), validation_share=share, seed=seed)
    for part in (corpus.train, corpus.validation):
        assert {document.domain for document in part} == {"a", "b", "c"}


def test_small_domain_gives_enough_to_validation_but_never_more_than_half() -> None:
    given = [Document(text=f"{i:03}" + "x" * 97, source=str(i), domain="d") for i in range(20)]
    assert len(build_corpus(given, validation_share=1e-9, min_validation_bytes=301).validation) == 4
    assert len(build_corpus(given, validation_share=1e-9, min_validation_bytes=10**6).validation) == 10


def test_max_bytes_takes_documents_in_order_until_it_is_reached() -> None:
    given = [Document(text=f"{i:04}" + "\u00e9" * 48, source=str(i), domain="d") for i in range(1000)]  # 100 bytes each
    whole = build_corpus(given, validation_share=0.2)
    part = build_corpus(given, validation_share=0.2, max_bytes=20_050)
    assert part.train == whole.train[:201]
    assert part.validation == whole.validation[:51]  # 20,050 x 0.2 / 0.8 = 5,012.5
    assert part.num_documents == 1000


@pytest.mark.parametrize("floor", [1, 500, 3000])
@pytest.mark.parametrize("max_bytes", [1, 2000, 9000])
def test_forgetting_texts_while_reading_changes_nothing(
    floor: int, max_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = documents(150, "a") + documents(100, "b") + documents(3, "c") + documents(40, "e")
    random.Random(0).shuffle(given)

    def build() -> Corpus:
        return build_corpus(given, validation_share=0.1, max_bytes=max_bytes, min_validation_bytes=floor)

    expected = build()
    held = []
    forget = split._forget

    def recorded(*arguments: object) -> int:
        held.append(forget(*arguments))  # type: ignore[arg-type]
        return held[-1]

    monkeypatch.setattr(split, "_forget", recorded)
    monkeypatch.setattr(split, "FORGET_ABOVE_BYTES", 100)
    assert build() == expected
    assert all(document.text for document in expected.train + expected.validation)
    assert held
    assert held[-1] < 0.7 * sum(len(document.text) for document in given)


@pytest.mark.parametrize(
    ("given", "arguments", "message"),
    [
        ([], {}, "found no document"),
        (documents(1, "lone") * 3 + documents(5), {}, r"domain 'lone': found 1 document \(lone/0\) .* lone=PATH"),
        (documents(5), {"validation_share": 0.0}, "validation_share: found 0.0, expected a number above 0"),
        (documents(5), {"validation_share": 1.0}, "validation_share: found 1.0"),
        (documents(5), {"max_bytes": 0}, "max_bytes: found 0, expected at least 1"),
        ([Document(text="\ud800", source="a.jsonl:7", domain="d")], {}, "a.jsonl:7: the text holds a lone surrogate"),
    ],
)
def test_corpus_that_cannot_be_split_is_refused(
    given: list[Document], arguments: dict[str, float], message: str
) -> None:
    with pytest.raises(SecateurError, match=message):
        build_corpus(given, **arguments)  # type: ignore[arg-type]


# --- tokenizer ---


def test_tokenizer_encodes_any_text_and_gives_it_back(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    trained = train_tokenizer([sentence(i) for i in range(50)], vocab_size=300)
    assert (len(byte_tokenizer), len(trained)) == (257, 300)
    assert trained.eos_token_id == trained.bos_token_id == trained.pad_token_id == 0
    assert trained.unk_token is None
    for text in (" two  spaces .", "\u00e9\u4e16\U0001f600\x00\r\n\t", sentence(99)):
        assert trained.decode(trained(text)["input_ids"]) == text
        assert len(trained(text)["input_ids"]) <= len(text.encode()) == len(byte_tokenizer(text)["input_ids"])


def test_tokenizer_is_trained_on_the_first_characters_only() -> None:
    limited = train_tokenizer(["abab" * 25, "abab" * 25 + "xyxy" * 50, "zz"], vocab_size=270, max_characters=200)
    assert limited.get_vocab() == train_tokenizer(["abab" * 25] * 2, vocab_size=270).get_vocab()
    assert limited.get_vocab() != train_tokenizer(["abab" * 50, "xyxy" * 50], vocab_size=270).get_vocab()


def test_saved_tokenizer_loads_and_encodes_the_same(tmp_path: Path) -> None:
    trained = train_tokenizer([sentence(i) for i in range(50)], vocab_size=300)
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded(sentence(77))["input_ids"] == trained(sentence(77))["input_ids"]
    assert (loaded.eos_token_id, len(loaded)) == (0, 300)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: train_tokenizer(["a"], vocab_size=256), "vocab_size: found 256, expected at least 257"),
        (lambda: train_tokenizer([]), "found no text to train on"),
        (lambda: load_tokenizer("no-such-folder"), "no such folder; expected a local folder"),
    ],
)
def test_tokenizer_that_cannot_be_made_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        call()


def test_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    with pytest.raises(SecateurError, match=r"found no tokenizer, expected one of tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SecateurError, match=r"tokenizer\.json: not JSON"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": "b"}, "merges": []}, "expected u32"),
        ("tokenizer.json", "model", {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}, "out of vocabulary"),
        ("tokenizer_config.json", "bos_token", 7, "bos_token has to be either str or AddedToken"),
        ("tokenizer_config.json", "tokenizer_class", 7, "'int' object has no attribute"),
        ("tokenizer_config.json", "model_max_length", "x", "model_max_length is 'x', expected a number"),
    ],
)
def test_the_file_at_fault_of_a_tokenizer_is_named(
    name: str, key: str, value: object, message: str, byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    byte_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    other = {"tokenizer.json", "tokenizer_config.json"} - {name}
    with pytest.raises(SecateurError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert name in str(caught.value)
    assert not any(one in str(caught.value) for one in other)


def test_tokenizer_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    train_tokenizer(["a"], vocab_size=257).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["own.Own", None]}, "tokenizer_class": "Own"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    mark = tmp_path / "was-run"
    (tmp_path / "own.py").write_text(f"open({str(mark)!r}, 'w')\nclass Own: pass\n")
    with pytest.raises(SecateurError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    assert not mark.exists()


def test_tokenizer_must_fit_the_model(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    check_vocabulary_fits(byte_tokenizer, 257)
    with pytest.raises(SecateurError, match="found 257 tokens, expected at most the model's vocab_size of 256"):
        check_vocabulary_fits(byte_tokenizer, 256)
    endless = train_tokenizer(["a"], vocab_size=257)
    endless.eos_token = None
    with pytest.raises(SecateurError, match="found eos_token_id None, expected an end-of-text token"):
        check_vocabulary_fits(endless, 1000)
    with pytest.raises(SecateurError, match="eos_token_id None"):
        pack(endless, documents(2), sequence_length=4)


# --- packing ---


def test_packing_golden(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    given = [Document(text=text, source="", domain=domain) for text, domain in (("ab", "x"), ("c", "y"), ("!", "x"))]
    packed = pack(byte_tokenizer, given, sequence_length=3)
    assert packed.blocks.tolist() == [[65, 66, 0], [67, 0, 1]]  # 'a' is 0x61 - 0x21 + 1
    assert packed.blocks.dtype == torch.int32
    assert (packed.num_documents, packed.num_tokens, packed.num_dropped) == (3, 6, 1)
    assert packed.tokens_by_domain == {"x": 5, "y": 2}


@pytest.mark.parametrize("sequence_length", [2, 7, 64])
@pytest.mark.parametrize("batch_characters", [50, 2**20])
def test_no_token_is_lost(sequence_length: int, batch_characters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", batch_characters)
    tokenizer = train_tokenizer([sentence(i) for i in range(50)], vocab_size=300)
    given = documents(20)
    stream = pack(tokenizer, given, sequence_length=sequence_length)
    whole = torch.cat([stream.blocks.flatten(), torch.zeros(stream.num_dropped, dtype=torch.int32)]).tolist()
    decoded = tokenizer.decode(whole[: stream.num_tokens])
    assert "<|endoftext|>".join([*texts(given), ""])[: len(decoded)] == decoded
    assert sum(stream.tokens_by_domain.values()) == stream.num_tokens + stream.num_dropped
    assert 0 <= stream.num_dropped < sequence_length
    if batch_characters == 2**20:  # nothing is cut into pieces
        expected = [token for text in texts(given) for token in [*tokenizer(text)["input_ids"], 0]]
        assert whole[: stream.num_tokens] == expected[: stream.num_tokens]
        assert len(whole) == len(expected)


def test_long_document_is_cut_after_lines_and_keeps_every_character(
    byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 10)
    document = Document(text="one\ntwo three\n" + "x" * 25, source="", domain="d")
    pieces = [piece.text for piece in packing._pieces([document])]
    assert pieces == ["one\n", "two three\n", "x" * 10, "x" * 10, "x" * 5]
    packed = pack(byte_tokenizer, [document], sequence_length=len(document.text) + 1)
    assert byte_tokenizer.decode(packed.blocks[0].tolist()) == document.text + "<|endoftext|>"
    assert (packed.num_documents, packed.num_dropped) == (1, 0)


def test_end_token_spelled_out_in_a_text_does_not_end_the_document(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    packed = pack(byte_tokenizer, [Document(text="<|endoftext|>", source="", domain="d")], sequence_length=14)
    assert packed.blocks[0].tolist().count(0) == 1


def test_max_tokens_stops_reading_as_soon_as_it_is_reached(
    byte_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 8)
    read = []

    def stream() -> Iterator[Document]:
        for i in range(100):
            read.append(i)
            yield Document(text="abcd", source="", domain="d")

    packed = pack(byte_tokenizer, stream(), sequence_length=4, max_tokens=11)
    assert (len(packed.blocks), packed.num_documents, packed.num_dropped) == (
        2,
        3,
        7,
    )  # a third block would exceed max_tokens
    assert len(read) <= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sequence_length": 100, "name": "the test"}, "the test: found 6 tokens, expected .* sequence_length 100"),
        ({"sequence_length": 1}, "sequence_length: found 1, expected at least 2"),
        ({"sequence_length": 4, "max_tokens": 3}, "max_tokens: found 3, expected at least one block of 4"),
    ],
)
def test_packing_that_cannot_be_done_is_refused(
    arguments: dict[str, int], message: str, byte_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(SecateurError, match=message):
        pack(byte_tokenizer, [Document(text="hello", source="", domain="d")], **arguments)  # type: ignore[arg-type]


def test_dataset_item_is_one_block_without_padding(byte_tokenizer: PreTrainedTokenizerBase) -> None:
    dataset = BlockDataset(pack(byte_tokenizer, documents(5), sequence_length=16))
    item = dataset[1]
    assert len(dataset) == len(dataset.blocks)
    assert set(item) == {"input_ids", "labels"}
    assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
    assert item["input_ids"].tolist() == item["labels"].tolist() == dataset.blocks[1].tolist()


def test_packed_tokens_survive_saving_byte_for_byte(byte_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    packed = pack(byte_tokenizer, documents(5, "a") + documents(3, "b"), sequence_length=16)
    packed.save(tmp_path / "a.safetensors")
    loaded = PackedTokens.load(tmp_path / "a.safetensors")
    loaded.save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert torch.equal(loaded.blocks, packed.blocks)
    assert loaded.digest() == packed.digest()
    for field in ("num_documents", "num_tokens", "num_dropped", "tokens_by_domain"):
        assert getattr(loaded, field) == getattr(packed, field)
    loaded.blocks[0, 0] += 1
    assert loaded.digest() != packed.digest()


def test_file_that_holds_no_packed_tokens_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"blocks": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(SecateurError, match=r"other.safetensors: 'format' is missing, found \[\]"):
        PackedTokens.load(tmp_path / "other.safetensors")
    about = {"format": "secateur-tokens", "version": 1, "num_documents": 1, "num_dropped": 0, "tokens_by_domain": {}}
    for blocks in (torch.zeros(4, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int64)):
        save_file({"blocks": blocks}, tmp_path / "blocks.safetensors", metadata={"secateur": json.dumps(about)})
        with pytest.raises(
            SecateurError, match=r"blocks.safetensors: found blocks torch.int.* expected \(N, S\) of in"
        ):
            PackedTokens.load(tmp_path / "blocks.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes()[:-2])
    for name in ("torn", "missing"):
        with pytest.raises(SecateurError, match=f"{name}.safetensors: not a readable file of packed tokens"):
            PackedTokens.load(tmp_path / f"{name}.safetensors")


# --- the whole preparation ---


def prepare_folder(folder: Path) -> prepare.PreparedData:
    return prepare.prepare(
        [str(folder / "novels"), f"Novels={folder / 'manuals'}"],
        vocab_size=300,
        sequence_length=16,
        validation_share=0.1,
        seed=5,
    )


def file_digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_report_counts_what_was_packed(two_domains: Path) -> None:
    calls: list[tuple[str, int, int | None]] = []
    specs = [str(two_domains / "novels"), str(two_domains / "manuals")]
    prepared = prepare.prepare(
        [*specs, specs[0]],
        vocab_size=300,
        sequence_length=16,
        progress=lambda description, done, total: calls.append((description, done, total)),
    )
    report = prepared.report
    assert json.loads(json.dumps(report)) == report
    assert report["sources"] == [*specs, specs[0]]
    assert (report["documents_found"], report["duplicates_removed"]) == (24, 12)
    assert list(report["domains"]) == list(prepared.validation) == ["manuals", "novels"]
    for domain, counts in report["domains"].items():
        files = list((two_domains / domain).iterdir())
        assert counts["documents"] == len(files) == 12
        assert counts["bytes"] == sum(path.stat().st_size for path in files)
        assert counts["validation_documents"] == prepared.validation[domain].num_documents
        assert counts["validation_tokens"] == prepared.validation[domain].blocks.numel()
    train_tokens = sum(counts["train_tokens"] for counts in report["domains"].values())
    assert train_tokens == prepared.train.num_tokens + prepared.train.num_dropped
    assert {call[0] for call in calls} >= {"read documents", "train tokenizer", "tokenise training documents"}
    assert all(done == total for _, done, total in {call[0]: call for call in calls}.values())


def test_prepared_data_loads_without_its_sources(two_domains: Path, tmp_path: Path) -> None:
    prepared = prepare_folder(two_domains)
    save_prepared(prepared, tmp_path / "run" / "data")
    for path in (two_domains / "novels").iterdir():
        path.unlink()
    loaded = load_prepared(tmp_path / "run" / "data")
    assert loaded.report == prepared.report
    assert loaded.train.digest() == prepared.train.digest()
    assert {domain: packed.digest() for domain, packed in loaded.validation.items()} == {
        domain: packed.digest() for domain, packed in prepared.validation.items()
    }
    assert loaded.tokenizer(sentence(3))["input_ids"] == prepared.tokenizer(sentence(3))["input_ids"]
    names = {path.name for path in (tmp_path / "run" / "data").iterdir()}
    assert names == {
        "data.json",
        "tokenizer",
        "train.safetensors",
        "validation-Novels.safetensors",
        "validation-novels-2.safetensors",
    }


@pytest.mark.process
@pytest.mark.slow
def test_preparation_is_byte_equal_in_another_process(two_domains: Path, tmp_path: Path) -> None:
    save_prepared(prepare_folder(two_domains), tmp_path / "here")
    program = (
        "import sys\nfrom secateur.data.prepare import prepare, save_prepared\nfolder = sys.argv[1]\n"
        "specs = [folder + '/novels', 'Novels=' + folder + '/manuals']\n"
        "save_prepared(prepare(specs, vocab_size=300, sequence_length=16, seed=5, validation_share=0.1), sys.argv[2])"
    )
    there = tmp_path / "there"
    in_fresh(program, two_domains, there, environment={"RAYON_NUM_THREADS": "1"})
    assert file_digests(there) == file_digests(tmp_path / "here")


def test_domain_names_cannot_leave_the_folder() -> None:
    names = prepare._file_names(["../../x", "a b", "A_b", "\u00fc" * 200])
    assert list(names.values()) == [
        "validation-______x.safetensors",
        "validation-a_b.safetensors",
        "validation-A_b-2.safetensors",
        "validation-" + "_" * 60 + ".safetensors",
    ]


def test_changed_token_file_is_refused(two_domains: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    save_prepared(prepare_folder(two_domains), folder)
    (folder / "validation-Novels.safetensors").write_bytes((folder / "train.safetensors").read_bytes())
    with pytest.raises(SecateurError, match=r"Novels\.safetensors: found tokens .* by .*data/data\.json"):
        load_prepared(folder)
    (folder / "data.json").write_text('{"format": "other"}')
    with pytest.raises(SecateurError, match=r"data\.json: 'format' is 'other', expected 'secateur-data'"):
        load_prepared(folder)
    with pytest.raises(SecateurError, match=r"data\.json: cannot be read"):
        load_prepared(tmp_path / "nowhere")


def test_failed_save_leaves_nothing_and_can_be_repeated(
    two_domains: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepare_folder(two_domains)
    run = tmp_path / "run"
    run.mkdir()

    def disk_full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packing, "atomic_write", disk_full)
        with pytest.raises(OSError, match="No space left"):
            save_prepared(prepared, run / "data")
    assert list(run.iterdir()) == []
    torn = run / f".data.{'0' * 16}.partial"
    torn.mkdir()
    (torn / "torn").write_text("of a killed run")
    (run / "data").mkdir()
    save_prepared(prepared, run / "data")
    assert [path.name for path in run.iterdir()] == ["data"]
    assert not (run / "data" / "torn").exists()
    with pytest.raises(SecateurError, match="it exists and is not empty, expected a new folder"):
        save_prepared(prepared, run / "data")


def test_embedded_default_can_be_prepared_small() -> None:
    prepared = prepare.prepare([], vocab_size=300, sequence_length=64, max_bytes=50_000)
    assert set(prepared.validation) == {"code", "prose"}
    assert prepared.report["sources"] == list(embedded_specs())
    assert prepared.report["documents_found"] > 500
    assert prepared.train.num_tokens > 10_000
    assert len(prepared.validation["prose"].blocks) >= 1


def test_given_tokenizer_is_used(two_domains: Path, byte_tokenizer: PreTrainedTokenizerBase) -> None:
    prepared = prepare.prepare([str(two_domains / "novels")], tokenizer=byte_tokenizer, sequence_length=16)
    assert prepared.tokenizer is byte_tokenizer
    assert prepared.report["vocab_size"] == 257


def test_domain_too_short_for_a_validation_block_is_named(tmp_path: Path) -> None:
    (tmp_path / "tiny.jsonl").write_text('{"text": "a"}\n{"text": "b"}')
    (tmp_path / "long.jsonl").write_text("\n".join(json.dumps({"text": sentence(i)}) for i in range(50)))
    with pytest.raises(SecateurError, match="validation documents of domain 'tiny': found 2 tokens, expected"):
        prepare.prepare(
            [str(tmp_path / "tiny.jsonl"), str(tmp_path / "long.jsonl")], vocab_size=300, sequence_length=16
        )
