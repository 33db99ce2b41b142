"""With what LAEP works: every row of the table in docs/laep.md, and the test behind it.

`tests/test_documents.py` compares this with the document, and sees that every test exists.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """kind: of thing. what: the thing. answer: what happens. test: "file::test" in tests/."""

    kind: str
    what: str
    answer: str
    test: str


def _rows(kind: str, *rows: tuple[str, str, str]) -> tuple[Row, ...]:
    return tuple(Row(kind=kind, what=what, answer=answer, test=test) for what, answer, test in rows)


_LISTS, _RUNS, _TRL = "train/test_lists_and_copies.py", "train/test_trainer_runs.py", "train/test_trl.py"
_ADAPTERS, _LOOP, _LAEP = "train/test_adapters_and_classes.py", "train/test_accelerate.py", "train/test_laep.py"
_CALLBACK, _SCRIPTS = "train/test_callback.py", "train/test_distributed_scripts.py"
_COUNTS, _AS_THEY_ARE, _LOGS = (
    "observation/test_what_counts.py",
    "train/test_scripts_as_they_are.py",
    "train/test_logs.py",
)
_ONCE = f"{_COUNTS}::test_each_training_token_counts_once_and_no_other"

WORKS_WITH: tuple[Row, ...] = (
    *_rows(
        "trainer",
        ("plain loop", "works", f"{_LAEP}::test_losses_up_to_the_pruning_are_those_of_a_run_without_it"),
        ("Trainer", "works", f"{_CALLBACK}::test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit"),
        ("TRL SFTTrainer", "works", f"{_TRL}::test_sft_prunes_with_its_balance_loss_and_goes_on"),
        (
            "TRL SFTTrainer, packed or padding-free",
            "counts to the token",
            f"{_TRL}::test_sft_counts_are_those_of_its_texts_to_the_token",
        ),
        ("TRL GRPOTrainer", "works; rollouts not counted", f"{_TRL}::test_rollouts_of_grpo_are_not_counted"),
        (
            "TRL DPOTrainer, `sync_ref_model`",
            "works; the reference in `copies`",
            f"{_TRL}::test_dpo_prunes_model_and_reference_which_is_kept_in_step",
        ),
        (
            "Accelerate, fp32 and bf16",
            "works",
            f"{_LOOP}::test_a_loop_prunes_and_goes_on_with_the_balance_loss_of_layers_that_differ",
        ),
        ("a second `train()`", "goes on", f"{_RUNS}::test_a_second_training_of_the_same_model_goes_on_from_the_first"),
    ),
    *_rows(
        "model",
        (
            "PEFT, adapters on attention",
            "works",
            f"{_ADAPTERS}::test_adapters_on_attention_train_through_a_pruning_in_a_trainer",
        ),
        (
            "PEFT, adapters on experts or routers",
            "refused",
            f"{_ADAPTERS}::test_adapters_on_experts_or_routers_are_refused_at_the_start_by_name",
        ),
        ("without a head", "works", f"{_ADAPTERS}::test_a_base_model_without_a_head_is_pruned_and_loads"),
        ("sequence classifier", "works", f"{_ADAPTERS}::test_a_sequence_classifier_is_pruned_and_loads"),
        (
            "a class that no auto class knows",
            "refused",
            f"{_ADAPTERS}::test_a_class_that_no_auto_class_knows_is_refused_at_the_start",
        ),
        (
            "compiled, or a part of it",
            "refused",
            f"{_AS_THEY_ARE}::test_a_model_that_is_compiled_in_any_part_is_refused_at_the_start",
        ),
        (
            "a second LAEP",
            "refused",
            f"{_AS_THEY_ARE}::test_a_second_laep_is_refused_until_the_first_has_ended",
        ),
        (
            "`deepcopy`, pickle, `torch.save`",
            "a plain model",
            f"{_COUNTS}::test_a_copy_of_the_model_is_a_plain_one",
        ),
        (
            "DistributedDataParallel",
            "works",
            "train/test_ddp.py::test_in_a_trainer",
        ),
        (
            "DistributedDataParallel over some of the processes",
            "refused",
            f"{_SCRIPTS}::test_a_ddp_over_a_part_of_the_processes_is_refused_at_the_first_forward",
        ),
        (
            "FSDP2; EP, TP",
            "works; parameters are new objects",
            f"{_SCRIPTS}::test_a_pruning_passes_its_self_check_and_the_event_says_which_parameters_are_new",
        ),
        (
            "several models from one config",
            "works",
            f"{_LISTS}::test_models_that_were_made_from_one_config_are_pruned_each_for_itself",
        ),
    ),
    *_rows(
        "optimizer",
        (
            "Adam, AdamW, SGD, RMSprop, Adafactor",
            "works",
            f"{_LAEP}::test_after_a_pruning_every_optimizer_goes_on_as_for_a_model_built_with_the_pruned_counts",
        ),
        (
            "Muon beside another",
            "works",
            "train/test_muon.py::test_muon_goes_on_as_for_a_model_built_with_the_pruned_counts_and_given_its_momentum",
        ),
        ("several", "works: give all of them", f"{_LISTS}::test_experts_and_routers_in_two_optimizers_go_on_as_in_one"),
        (
            "one that lacks a trained expert or router (also: fp32 master copies)",
            "refused",
            f"{_LISTS}::test_an_optimizer_that_holds_none_of_the_parameters_is_refused_at_the_start",
        ),
        (
            "one that is not stepped",
            "error at the pruning",
            f"{_LISTS}::test_an_optimizer_that_never_steps_is_found_at_the_pruning_and_nothing_is_changed",
        ),
        ("wrappers of Accelerate and Lightning", "works", f"{_LISTS}::test_the_wrapper_of_lightning_is_seen_through"),
        (
            "NAdam, RAdam, Adagrad, LBFGS, bitsandbytes and others",
            "refused",
            "surgery/test_surgery_optimizer.py::test_an_optimizer_that_no_rule_covers_is_refused_by_name",
        ),
    ),
    *_rows(
        "option",
        (
            "gradient clipping by a list",
            "works",
            f"{_LISTS}::test_a_list_of_parameters_clips_the_gradients_that_there_are_after_a_pruning",
        ),
        (
            "hooks on parameters",
            "works; refused on sharded ones",
            f"{_LISTS}::test_hooks_that_were_set_after_laep_was_made_see_the_gradients_of_the_experts_that_are_left",
        ),
        (
            "EMA, reference model",
            "works: `copies=[...]`",
            f"{_LISTS}::test_copies_follow_a_pruning_and_go_on_as_averages",
        ),
        (
            "`output_router_logits`",
            "works",
            f"{_TRL}::test_a_trainer_with_router_logits_trains_before_and_after_a_pruning",
        ),
        (
            "`load_best_model_at_end`, early stopping",
            "works; refused for sharded models and adapters",
            f"{_RUNS}::test_the_best_checkpoint_is_loaded_back_with_its_experts_and_shape",
        ),
        (
            "`resume_from_checkpoint` across a pruning",
            "works; sharded models and adapters: load the model from it",
            f"{_CALLBACK}::test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit",
        ),
        (
            "a checkpoint that another callback, or one rank, asks for",
            "works",
            f"{_SCRIPTS}::test_a_checkpoint_that_one_rank_wants_is_written_by_all_and_a_second_training_goes_on",
        ),
        (
            "autocast, GradScaler",
            "works",
            f"{_LAEP}::test_mixed_precision_and_a_gradient_scaler_go_on_after_a_pruning",
        ),
        ("frozen routers", "works", f"{_LAEP}::test_routers_that_are_frozen_are_pruned_and_stay_frozen"),
        (
            "gradient accumulation",
            "works; `step` after a micro-batch waits",
            f"{_AS_THEY_ARE}::test_a_call_after_each_micro_batch_waits_for_the_step_of_the_optimizer",
        ),
        (
            "activation checkpointing, `checkpoint()` around the model",
            "works; counted once",
            _ONCE,
        ),
        (
            "torch's wrapper of activation checkpointing",
            "works",
            f"{_AS_THEY_ARE}::test_wrappers_of_activation_checkpointing_change_neither_pruning_nor_training",
        ),
        ("own loss on `model.model(...)`, layers called by hand", "counted", _ONCE),
        ("`generate`, passes without gradients", "not counted", _ONCE),
        (
            "masks: 2-D, numbers of segments, 4-D, a dict",
            "read; others need `count_mask`",
            f"{_COUNTS}::test_a_token_that_may_not_attend_to_itself_is_padding",
        ),
        (
            "padding without a mask",
            "left out by labels and pad id, else one warning",
            f"{_AS_THEY_ARE}::test_padding_without_a_mask_is_left_out_or_named_once",
        ),
        (
            "loggers of the Trainer",
            "get `laep/...` numbers",
            f"{_LOGS}::test_a_pruning_and_its_loads_are_seen_in_tensorboard",
        ),
        (
            "learning-rate schedules",
            "works",
            f"{_LAEP}::test_the_learning_rate_schedule_is_the_same_with_and_without_pruning",
        ),
        (
            "`torch_compile`, `deepspeed`, `auto_find_batch_size`, `use_liger_kernel`",
            "refused",
            f"{_CALLBACK}::test_training_arguments_that_a_pruning_cannot_follow_are_refused_before_the_first_step",
        ),
    ),
)
