"""Small copies of checkpoints as they are published: config keys, architecture, tensor names, side files; few experts.

Weights are random. Code that lies beside a published checkpoint raises here: nobody may run it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, Gemma4ForCausalLM, Gemma4ForConditionalGeneration, PreTrainedModel

from secateur.model_folder.rewrite.apply import apply_to_model
from secateur.plans import LayerPlan, Plan
from support.model_folders import config_of, tensors_of, write
from support.odd_folders import deepseek, on_disk, qwen3_5
from support.tiny_models import HEADS, NUM_EXPERTS, TOP_K, VOCABULARY, WIDTH

NOT_TO_RUN = 'raise RuntimeError("code beside a checkpoint was run")\n'
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}


def with_files(folder: Path, **files: Any) -> Path:
    """The folder with small files more: text as it is, all else as JSON. `__` in a name stands for its dot."""
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def own_code(folder: Path, name: str) -> Path:
    """With the code that its auto_map names."""
    return with_files(folder, **{f"configuration_{name}__py": NOT_TO_RUN, f"modeling_{name}__py": NOT_TO_RUN})


def in_fp8(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of the layers as DeepSeek-V3 stores them: 8 bits and a scale for each block."""
    made = {}
    for name, value in tensors.items():
        if ".layers." in name and name.endswith("_proj.weight"):
            made[name] = value.to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = torch.ones(1, 1)
        else:
            made[name] = value
    return made


def kimi_k2(folder: Path, *, fp8: bool = False) -> Path:
    """Kimi-K2: a model type of its own with the class of DeepSeek-V3, and tokens beyond a cut vocabulary."""
    code = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    }
    config, tensors = deepseek(model_type="kimi_k2", auto_map=code, bos_token_id=163584, eos_token_id=163585)
    if fp8:
        config, tensors = config | {"quantization_config": FP8}, in_fp8(tensors)
    write(folder, config, tensors)
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]}}
    with_files(folder, tokenization_kimi__py=NOT_TO_RUN, tokenizer_config__json=tokenizer, tiktoken__model="IQ== 0\n")
    return own_code(folder, "deepseek")


def phi_3_5_moe(folder: Path) -> Path:
    """Phi-3.5-MoE: a known model type, and another spelling of its class."""
    code = {
        "AutoConfig": "configuration_phimoe.PhiMoEConfig",
        "AutoModelForCausalLM": "modeling_phimoe.PhiMoEForCausalLM",
    }
    config = config_of("phimoe", architectures=["PhiMoEForCausalLM"], auto_map=code)
    return own_code(write(folder, config, on_disk("phimoe")), "phimoe")


def gemma_4(folder: Path, **text: Any) -> Path:
    """Gemma 4 26B-A4B: experts in the text model, top-k as `top_k_experts`; `text` are more keys of it."""
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16,
    }  # fmt: skip
    fields = _gemma_4_text() | text
    torch.manual_seed(0)
    model = Gemma4ForConditionalGeneration(
        AutoConfig.for_model("gemma4", text_config=fields, vision_config=vision, audio_config=None)
    )
    return _vivid(model, folder)


def gemma_4_text(folder: Path, **text: Any) -> Path:
    """The text model of it alone."""
    torch.manual_seed(0)
    return _vivid(Gemma4ForCausalLM(AutoConfig.for_model("gemma4_text", **_gemma_4_text() | text)), folder)


def _gemma_4_text() -> dict[str, Any]:
    return HEADS | {
        "vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"], "hidden_size_per_layer_input": 0,
        "enable_moe_block": True, "num_experts": NUM_EXPERTS, "top_k_experts": TOP_K, "moe_intermediate_size": WIDTH,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "final_logit_softcapping": 30.0,
    }  # fmt: skip


def _vivid(model: PreTrainedModel, folder: Path) -> Path:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def glm_two_names(folder: Path, other: int = NUM_EXPERTS) -> Path:
    """A GLM that says its number of experts twice."""
    return write(folder, config_of("glm4_moe", num_experts=other), on_disk("glm4_moe"))


def hunyuan_a13b(folder: Path) -> Path:
    """Hunyuan-A13B: numbers as lists by layer."""
    lists = {"moe_topk": [TOP_K] * 3, "num_shared_expert": [1] * 3, "moe_intermediate_size": [WIDTH] * 3}
    config = config_of("hunyuan_v1_moe", num_experts=[NUM_EXPERTS] * 3, **lists)
    return write(folder, config, on_disk("hunyuan_v1_moe"))


def glm_4_5(folder: Path) -> Path:
    """GLM-4.5 with its layer for a further token, which holds an embedding and a head of its own."""
    config, tensors = config_of("glm4_moe", num_nextn_predict_layers=1), on_disk("glm4_moe")
    last, extra = "model.layers.2.", "model.layers.3."
    mine = {name.replace(last, extra): value.clone() for name, value in tensors.items() if name.startswith(last)}
    mine |= {f"{extra}{name}.weight": torch.rand(32) for name in ("enorm", "hnorm", "shared_head.norm")}
    mine |= {f"{extra}{name}.weight": torch.rand(VOCABULARY, 32) for name in ("embed_tokens", "shared_head.head")}
    mine[f"{extra}eh_proj.weight"] = torch.rand(32, 64)
    return write(folder, config, tensors | mine)


def pruned_elsewhere(folder: Path, num_experts: int = 4) -> Path:
    """A model inside another that a tool pruned to the first few experts, and whose config.json says the old number."""
    with tempfile.TemporaryDirectory() as place:
        source = qwen3_5(Path(place) / "source")
        layers = {layer: LayerPlan(experts_before=8, order=tuple(range(num_experts))) for layer in range(3)}
        apply_to_model(source, Plan(layers=layers, criterion="another tool"), Path(place) / "out")
        tensors = tensors_of(Path(place) / "out")
        return write(folder, json.loads((source / "config.json").read_text()), tensors)


def in_modelopt(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices of the experts as ModelOpt stores them: 8 bits, with a scale for each and one of its input."""
    made = {}
    for name, value in tensors.items():
        made[name] = value
        if ".experts." in name and name.endswith("_proj.weight"):
            stem = name.removesuffix(".weight")
            made[name] = value.to(torch.float8_e4m3fn)
            made |= {f"{stem}.weight_scale": torch.rand(()), f"{stem}.input_scale": torch.rand(())}
    return made


def modelopt(folder: Path, *, said: bool = True, **quantization: Any) -> Path:
    """A model that ModelOpt quantised; `said` in its config.json, or not. `quantization` are more keys of its own."""
    config, tensors = deepseek()
    if said:
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    write(folder, config, in_modelopt(tensors))
    written = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", **quantization}}
    return with_files(folder, hf_quant_config__json=written) if said else folder


def mixtral(folder: Path) -> Path:
    """Mixtral as its authors published it: with the config in their own form, and the weights once more."""
    write(folder, config_of("mixtral"), on_disk("mixtral"))
    moe = {"num_experts_per_tok": TOP_K, "num_experts": NUM_EXPERTS}
    with_files(folder, params__json={"dim": 32, "n_layers": 3, "moe": moe}, consolidated__safetensors="weights")
    return with_files(folder, tokenizer__model="pieces", tokenizer_config__json={}, __gitattributes="*.bin filter=lfs")


def trainer_checkpoint(folder: Path) -> Path:
    """checkpoint-N of transformers' Trainer."""
    write(folder, config_of("qwen3_moe"), on_disk("qwen3_moe"))
    state = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "rng_state.pth", "training_args.bin", "latest")
    with_files(folder, trainer_state__json={"global_step": 500}, generation_config__json={"eos_token_id": 0})
    return with_files(folder, **dict.fromkeys((name.replace(".", "__") for name in state), "state"))


def with_company(folder: Path) -> Path:
    """What lies beside the weights of published models: other forms, folders, configs for other code, processors."""
    write(folder, config_of("gpt_oss"), on_disk("gpt_oss"))
    inner = {
        "original": {"model__safetensors": "weights", "config__json": {"num_experts": 8}, "dtypes__json": {}},
        "onnx": {"model__onnx": "weights", "config__json": {}},
        "inference": {"config_big__json": {"n_routed_experts": 8}, "config_kernels__json": {"block": 128}},
        "1_Pooling": {"config__json": {"word_embedding_dimension": 32}},
        ".cache": {"download__json": {}},
    }
    for name, files in inner.items():
        (folder / name).mkdir()
        with_files(folder / name, **files)
    others = ("pytorch_model.bin.index.json", "model.fp16.safetensors", "model-q4.gguf", "adapter_model.safetensors")
    with_files(folder, **dict.fromkeys((name.replace(".", "__") for name in others), "{}"))
    with_files(folder, adapter_config__json={"peft_type": "LORA"}, preprocessor_config__json={"size": 28})
    return with_files(folder, chat_template__jinja="{{ messages }}", LICENSE="free", __gitattributes="*.bin filter=lfs")


def in_hub_cache(source: Path, folder: Path) -> Path:
    """The folder as huggingface_hub keeps it: a snapshot of links to blobs."""
    snapshot = folder / "snapshots/0123abcd"
    for number, path in enumerate(sorted(one for one in source.rglob("*") if one.is_file())):
        blob, link = folder / f"blobs/{number:064x}", snapshot / path.relative_to(source)
        for place in (blob, link):
            place.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(path.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot
