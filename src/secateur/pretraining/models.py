"""The model of a pre-training run: a preset, a config.json, or a folder with weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.tokenizer import check_vocabulary_fits, load_tokenizer, separator
from secateur.errors import SecateurError, foreign
from secateur.families import MoEModel, describe_moe
from secateur.files.json import read_json, read_object
from secateur.files.limits import MAX_EXPERTS
from secateur.files.safetensors_header import read_header
from secateur.modeling_secateur import MODEL_TYPE, ExpertLayout, read_pruned_config
from secateur.pretraining.presets import COMMON, PRESETS
from secateur.pretraining.settings import ModelSettings
from secateur.surgery.load_faults import MISFIT, faults_named
from secateur.surgery.plausible import check_counts, no_more_modules_than
from secateur.train.distributed.fsdp import align_
from secateur.train.distributed.load import ParallelSizes, check_sharded, check_split

MAX_LAYERS, MAX_MODULES, WHY = 1_000, 200_000, "as no model has more"


def given_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase | None:
    """The tokenizer of --tokenizer, else the one in the --model folder; None where one is trained on the data.

    Raises:
        SecateurError: there is none in the folder. A model that was trained before cannot go on with other ids.
    """
    if settings.tokenizer is not None:
        return load_tokenizer(Path(settings.tokenizer))
    if settings.model is None:
        return None
    try:
        return load_tokenizer(Path(settings.model))
    except SecateurError as error:
        raise SecateurError(f"--model {settings.model}: {error}; give the model's own one by --tokenizer") from error


def model_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """The config that `settings` name. A preset takes its vocabulary from `tokenizer` (or --vocab-size without one).

    Raises:
        SecateurError: an unknown preset or config field, a config that transformers does not take, or a tokenizer with
            more tokens than the config's vocabulary (a tokenizer yet to be trained: --vocab-size).
    """
    if settings.model is not None:
        config = _read_folder(Path(settings.model), "--model ")
    elif settings.config is not None:
        config = _read_config(Path(settings.config), settings.overrides)
    else:
        assert settings.preset is not None
        config = _preset(settings.preset, settings.overrides, tokenizer, settings.vocab_size)
    num_rows = config.get_text_config().vocab_size
    if tokenizer is not None:
        check_vocabulary_fits(tokenizer, num_rows)
    elif settings.vocab_size > num_rows:
        raise SecateurError(
            f"--vocab-size is {settings.vocab_size}, expected at most the model's vocab_size of {num_rows}; "
            "or give the model's tokenizer by --tokenizer"
        )
    return config


def make_model(settings: ModelSettings, config: PreTrainedConfig) -> PreTrainedModel:
    """A model in float32 with random weights drawn from the current random state, or the weights of --model.

    Raises:
        SecateurError: the weights do not fit the config exactly.
    """
    if settings.model is None:
        # without dtype, a config.json that says bfloat16 makes bfloat16 weights
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=torch.float32
        )
        return model
    return load_model(Path(settings.model))


def empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device, without weights.

    Raises:
        SecateurError: transformers cannot build it.
    """
    try:
        with torch.device("meta"), no_more_modules_than(MAX_MODULES, WHY):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=torch.float32
            )
    except Exception as error:  # a model class may raise anything at a config it cannot build
        raise SecateurError(f"{config.model_type}: transformers cannot build this model: {error}") from error
    return model


def load_model(folder: Path, sizes: ParallelSizes | None = None) -> PreTrainedModel:
    """A causal LM from a local folder in float32; every tensor must be there and fit.

    Args:
        sizes: how the ranks of this job split it; None for a whole model.

    Raises:
        SecateurError: a tensor is missing, left over or of another shape, or the model cannot be split like that.
    """
    return load_moe(folder, sizes).model if sizes and sizes.is_sharded else _load(folder)


def load_moe(folder: Path, sizes: ParallelSizes, layout: ExpertLayout | None = None) -> MoEModel:
    """`load_model`, and what it loaded described.

    Args:
        layout: of the same model, if it is known; see `describe_moe`.

    Raises:
        SecateurError: see `load_model`; or it is no MoE that can be pruned.
    """
    if not sizes.is_sharded:
        return describe_moe(_load(folder), layout)
    whole = describe_moe(empty_model(_read_folder(folder)), layout)
    check_split(whole, sizes)
    moe = describe_moe(_load(folder, distributed_config=sizes.config()), whole.layout)
    check_sharded(moe, sizes)
    align_(moe.model)
    return moe


def _load(folder: Path, **split: Any) -> PreTrainedModel:
    model: PreTrainedModel
    report: Mapping[str, Any]
    _check_size(read_object(folder / "config.json"), f"{folder}/config.json")
    for path in sorted(folder.glob("*.safetensors")):
        read_header(path)
    what = f"{folder}: not readable as a causal language model"
    try:
        with faults_named(folder), no_more_modules_than(MAX_MODULES, WHY):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=torch.float32,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
                **split,
            )
            model, report = loaded
    except (OSError, SafetensorError) as error:
        raise SecateurError(f"{what}: {error}") from error
    wrong = {key: sorted(map(str, value)) for key, value in report.items() if value}
    if wrong:
        raise SecateurError(f"{folder}: {MISFIT}: {wrong}")
    return model


def model_facts(settings: ModelSettings, moe: MoEModel) -> dict[str, Any]:
    """What run.json says of the model, as JSON values."""
    return {
        "model_type": moe.model_type,
        "attention": PRESETS[settings.preset][1] if settings.preset else moe.model_type,
        "parameters": moe.num_parameters,
        "layers": moe.model.config.num_hidden_layers,
        "top_k": moe.top_k,
        "experts": {str(layer): count for layer, count in moe.counts.items()},
    }


def _preset(
    name: str, overrides: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase | None, vocab_size: int
) -> PreTrainedConfig:
    if name not in PRESETS:
        raise SecateurError(f"--preset {name!r}: expected one of {', '.join(PRESETS)}")
    model_type, _, fields = PRESETS[name]
    end = 0 if tokenizer is None else separator(tokenizer)
    words = {"vocab_size": vocab_size if tokenizer is None else len(tokenizer), "bos_token_id": end}
    words |= {"eos_token_id": end, "pad_token_id": end}
    return _from_dict({**COMMON, **fields, **words, "model_type": model_type}, overrides, f"--preset {name}")


def _read_config(path: Path, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    content = read_json(path, where=f"--config {path}")
    if not isinstance(content, dict) or "model_type" not in content:
        raise SecateurError(f"--config {path}: expected a transformers config.json with a model_type")
    return _from_dict(content, overrides, f"--config {path}")


def _read_folder(folder: Path, option: str = "") -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise SecateurError(f"{option}{folder}: expected a folder with a config.json and weights")
    _check_size(read_object(folder / "config.json"), f"{option}{folder}/config.json")
    try:
        with foreign(f"{option}{folder}: its config.json"):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except OSError as error:
        raise SecateurError(f"{option}{folder}: {error}") from error
    return config


def _from_dict(content: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> PreTrainedConfig:
    fields = dict(content)
    model_type = fields.pop("model_type")
    _check_size({**fields, **overrides}, where)
    try:
        config = _config(model_type, fields)
        unknown = [key for key in overrides if not hasattr(config, key)]
        if unknown:
            raise SecateurError(f"--set {unknown[0]}: {where} ({model_type}) has no such field")
        config = _config(model_type, {**fields, **overrides})
    except SecateurError:
        raise
    except Exception as error:  # a config class may raise anything at a value it does not like
        raise SecateurError(f"{where}: transformers does not take it as a {model_type!r} config: {error}") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise SecateurError(f"{where}: model type {model_type!r} has no causal language model in this transformers")
    return config


def _check_size(config: Mapping[str, Any], where: str) -> None:
    """Raises SecateurError: a config of more layers or experts than any model has, which would be built at once."""
    try:
        check_counts(config, layers=MAX_LAYERS, experts=MAX_EXPERTS, why=WHY)
    except SecateurError as error:
        raise SecateurError(f"{where}: {error}") from error


def _config(model_type: str, fields: Mapping[str, Any]) -> PreTrainedConfig:
    config: PreTrainedConfig
    if model_type == MODEL_TYPE:  # of a pruned model: its layers are in the config, its class is made from them
        config = read_pruned_config({**fields, "model_type": model_type})
    else:
        config = AutoConfig.for_model(model_type, **fields)
    return config
